//! Which descriptors and tables are one and the same kernel object.
//!
//! kcmp orders objects, so that each new one is compared with few of those known: a binary search in
//! a sorted list.

use std::cmp::Ordering;

/// Finds the object among `known`, which is sorted by kcmp: its place, or where it belongs.
pub(super) fn search<T, E>(
    known: &[T],
    mut compare: impl FnMut(&T) -> Result<Ordering, E>,
) -> Result<Result<usize, usize>, E> {
    let (mut low, mut high) = (0, known.len());
    while low < high {
        let middle = low + (high - low) / 2;
        match compare(&known[middle])? {
            Ordering::Equal => return Ok(Ok(middle)),
            Ordering::Less => low = middle + 1,
            Ordering::Greater => high = middle,
        }
    }
    Ok(Err(low))
}

#[cfg(test)]
mod tests {
    use super::*;
    use firn_sys::Pid;
    use firn_sys::kcmp::{Resource, kcmp};
    use std::os::fd::AsRawFd;

    #[test]
    fn objects_are_found_where_they_were_put() {
        let mut known: Vec<u32> = Vec::new();
        for value in [5, 1, 9, 3, 7, 1, 9] {
            let found = search(&known, |other| Ok::<_, ()>(other.cmp(&value)));
            if let Ok(Err(at)) = found {
                known.insert(at, value);
            }
        }
        assert_eq!(known, [1, 3, 5, 7, 9]);
    }

    #[test]
    fn duplicates_of_one_file_are_told_from_others() {
        let files: Vec<_> = (0..20)
            .map(|_| std::fs::File::open("/dev/null").expect("null"))
            .collect();
        let doubles: Vec<_> = files.iter().map(|f| f.try_clone().expect("dup")).collect();
        let me = Pid::this();
        let mut known: Vec<i32> = Vec::new();
        for fd in files.iter().chain(&doubles).map(AsRawFd::as_raw_fd) {
            let order = |fd1: &i32| kcmp(me, me, Resource::File { fd1: *fd1, fd2: fd });
            if let Err(at) = search(&known, order).expect("kcmp") {
                known.insert(at, fd);
            }
        }
        assert_eq!(known.len(), 20);
    }
}
