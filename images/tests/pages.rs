//! Pagemaps and pages files, alone and in chains of increments.

use std::fs;
use std::io::Write;
use std::path::Path;

use firn_images::{
    ImageDir, ImageKind, ImageSetWriter, PAGE_SIZE, PageFlags, PagePlace, PageSource,
    PageSourceError, Pagemap, PagemapWriter,
};
use firn_proto::{InventoryEntry, PagemapEntry, PagemapHead};
use proptest::prelude::*;

const PRESENT: PageFlags = PageFlags::PRESENT;
const PARENT: PageFlags = PageFlags::PARENT;

fn page(number: u64) -> u64 {
    number * PAGE_SIZE
}

/// Writes a set with one pagemap; present pages are filled with `fill`.
fn write_pages(dir: &Path, parent: Option<&Path>, runs: &[(u64, u64, PageFlags)], fill: u8) {
    let set = ImageSetWriter::create(dir).expect("set");
    let mut pagemap = PagemapWriter::new(&set, ImageKind::Pagemap, 7, 1).expect("pagemap");
    let mut pages = set.raw_file(ImageKind::Pages, 1).expect("pages");
    for (first, count, flags) in runs {
        pagemap.push(page(*first), *count, *flags).expect("run");
    }
    let present = pagemap.finish().expect("finish");
    let bytes = vec![fill; usize::try_from(page(present)).expect("small")];
    pages.write_all(&bytes).expect("write");
    if let Some(parent) = parent {
        set.set_parent(parent).expect("parent");
    }
    set.seal(&InventoryEntry {
        img_version: 2,
        ..Default::default()
    })
    .expect("seal");
}

/// Writes entries as somebody else would have, without any checks.
fn write_foreign(dir: &Path, entries: &[PagemapEntry]) {
    let set = ImageSetWriter::create(dir).expect("set");
    let mut writer = set.writer(ImageKind::Pagemap, 7);
    writer.entry(&PagemapHead { pages_id: 1 }).expect("head");
    entries.iter().for_each(|e| writer.entry(e).expect("entry"));
    writer.finish().expect("finish");
    set.raw_file(ImageKind::Pages, 1)
        .expect("pages")
        .set_len(page(1000))
        .expect("length");
    set.seal(&InventoryEntry {
        img_version: 2,
        ..Default::default()
    })
    .expect("seal");
}

fn source(dir: &Path) -> Result<PageSource, PageSourceError> {
    PageSource::open(&ImageDir::open(dir).expect("open"), ImageKind::Pagemap, 7)
}

/// What a page is filled with.
fn content(source: &PageSource, number: u64) -> u8 {
    let run = source.run_at(page(number)).expect("page");
    let PagePlace::Stored { file, offset, .. } = run.place else {
        panic!("{run:?}")
    };
    let mut bytes = vec![0; 4096];
    let offset = offset + page(number) - run.vaddr;
    source.files()[file]
        .read_exact_at(&mut bytes, offset)
        .expect("read");
    assert!(bytes.iter().all(|b| *b == bytes[0]));
    bytes[0]
}

#[test]
fn neighbours_become_one_run_and_both_counts_are_written() {
    let dir = tempfile::tempdir().expect("scratch");
    write_pages(
        dir.path(),
        None,
        &[(1, 2, PRESENT), (3, 1, PRESENT), (9, 1, PRESENT)],
        1,
    );
    let images = ImageDir::open(dir.path()).expect("open");
    let mut reader = images.reader(ImageKind::Pagemap, 7).expect("reader");
    assert_eq!(
        reader.expect_entry::<PagemapHead>().expect("head").pages_id,
        1
    );
    let entries: Vec<PagemapEntry> = reader.rest().expect("entries");
    let entry = |first, count: u32| PagemapEntry {
        vaddr: page(first),
        compat_nr_pages: count,
        in_parent: None,
        flags: Some(4),
        nr_pages: Some(count.into()),
    };
    assert_eq!(entries, [entry(1, 3), entry(9, 1)]);
    let pagemap = Pagemap::read(&images, ImageKind::Pagemap, 7).expect("pagemap");
    assert_eq!(pagemap.runs[1].offset, page(3));
    assert_eq!(pagemap.present_bytes(), page(4));
}

#[test]
fn runs_out_of_order_are_refused_when_written() {
    let dir = tempfile::tempdir().expect("scratch");
    let set = ImageSetWriter::create(dir.path()).expect("set");
    let mut pagemap = PagemapWriter::new(&set, ImageKind::Pagemap, 7, 1).expect("pagemap");
    assert_eq!(pagemap.push(page(4), 2, PRESENT).expect("run"), 0);
    assert_eq!(pagemap.push(page(6), 1, PARENT).expect("run"), page(2));
    for (vaddr, count) in [
        (page(5), 1),
        (page(9), 0),
        (page(9) + 1, 1),
        (page(9), u64::MAX),
    ] {
        assert!(
            pagemap.push(vaddr, count, PRESENT).is_err(),
            "{vaddr:#x} {count}"
        );
    }
    assert_eq!(pagemap.push(page(7), 1, PRESENT).expect("run"), page(2));
}

#[test]
fn pages_are_found_through_parents() {
    let root = tempfile::tempdir().expect("scratch");
    let dirs = ["a", "b", "c"].map(|name| root.path().join(name));
    dirs.iter()
        .for_each(|d| fs::create_dir(d).expect("directory"));
    write_pages(&dirs[0], None, &[(10, 10, PRESENT)], b'a');
    let middle = [(10, 4, PARENT), (14, 2, PRESENT), (16, 4, PARENT)];
    write_pages(&dirs[1], Some(Path::new("../a")), &middle, b'b');
    let top = [(8, 3, PRESENT), (11, 8, PARENT), (30, 1, PageFlags::LAZY)];
    write_pages(&dirs[2], Some(Path::new("../b")), &top, b'c');
    let found = source(&dirs[2]).expect("source");
    let contents: Vec<u8> = (8..19).map(|number| content(&found, number)).collect();
    assert_eq!(contents, b"cccaaabbaaa");
    assert_eq!(found.runs().len(), 5);
    assert_eq!(
        found.run_at(page(30)).map(|r| r.place),
        Some(PagePlace::Remote)
    );
    assert!(found.run_at(page(19)).is_none() && found.run_at(page(7)).is_none());
}

#[test]
fn files_that_were_let_go_are_read_all_the_same() {
    let dir = tempfile::tempdir().expect("scratch");
    let (old, new) = (dir.path().join("old"), dir.path().join("new"));
    for dir in [&old, &new] {
        fs::create_dir(dir).expect("directory");
    }
    write_pages(&old, None, &[(1, 2, PRESENT)], 3);
    write_pages(
        &new,
        Some(Path::new("../old")),
        &[(1, 1, PARENT), (2, 1, PRESENT)],
        4,
    );
    let mut source = source(&new).expect("source");
    assert!(source.holds_files());
    source.let_files_go();
    assert!(!source.holds_files() && source.files().iter().all(|file| file.held().is_none()));
    assert_eq!([1, 2].map(|number| content(&source, number)), [3, 4]);
    fs::remove_file(old.join("pages-1.img")).expect("it is there");
    assert!(source.files().iter().any(|file| file.file().is_err()));
}

#[test]
fn pages_in_no_parent_are_an_error() {
    let root = tempfile::tempdir().expect("scratch");
    let (a, b) = (root.path().join("a"), root.path().join("b"));
    fs::create_dir(&a).expect("directory");
    fs::create_dir(&b).expect("directory");
    write_pages(&a, None, &[(10, 2, PRESENT), (13, 1, PRESENT)], b'a');
    write_pages(&b, Some(&a), &[(10, 4, PARENT)], b'b');
    let error = source(&b).expect_err("hole at page 12");
    assert!(matches!(error, PageSourceError::NotInParent { vaddr, .. } if vaddr == page(12)));
    fs::remove_file(b.join("parent")).expect("remove");
    let error = source(&b).expect_err("no parent");
    assert!(matches!(error, PageSourceError::NotInParent { vaddr, .. } if vaddr == page(10)));
    std::os::unix::fs::symlink(".", b.join("parent")).expect("link");
    let error = source(&b).expect_err("circle");
    assert!(
        matches!(error, PageSourceError::ParentLoop { .. }),
        "{error}"
    );
}

#[test]
fn a_short_pages_file_is_an_error() {
    let dir = tempfile::tempdir().expect("scratch");
    write_pages(dir.path(), None, &[(1, 3, PRESENT)], 1);
    let pages = fs::File::options()
        .write(true)
        .open(dir.path().join("pages-1.img"));
    pages.expect("open").set_len(page(3) - 1).expect("truncate");
    let error = source(dir.path()).expect_err("short");
    assert_eq!(
        error.to_string(),
        format!(
            "{}/pages-1.img has 12287 bytes where its pagemap describes 12288",
            dir.path().canonicalize().expect("path").display()
        )
    );
}

#[test]
fn entries_of_all_releases_are_understood() {
    let dir = tempfile::tempdir().expect("scratch");
    let old = PagemapEntry {
        vaddr: page(1),
        compat_nr_pages: 2,
        ..Default::default()
    };
    // CRIU 4.2 leaves the older count at 0.
    let new = PagemapEntry {
        vaddr: page(5),
        compat_nr_pages: 0,
        flags: Some(6),
        nr_pages: Some(3),
        in_parent: None,
    };
    write_foreign(dir.path(), &[old, new]);
    let found = source(dir.path()).expect("source");
    let counts: Vec<u64> = found.runs().iter().map(|r| r.nr_pages).collect();
    assert_eq!(counts, [2, 3]);
    let place = PagePlace::Stored {
        file: 0,
        offset: page(2),
        may_be_lazy: true,
    };
    assert_eq!(found.runs()[1].place, place);
}

#[test]
fn senseless_runs_are_errors() {
    let run = |vaddr, nr_pages, flags| PagemapEntry {
        vaddr,
        compat_nr_pages: 0,
        in_parent: None,
        flags: Some(flags),
        nr_pages: Some(nr_pages),
    };
    let cases = [
        (vec![run(page(1), 0, 4)], "has no pages"),
        (vec![run(page(1) + 8, 1, 4)], "does not begin at a page"),
        (
            vec![run(page(1), u64::MAX, 4)],
            "goes beyond the end of memory",
        ),
        (
            vec![run(page(1), 2, 4), run(page(2), 1, 4)],
            "begins before the end",
        ),
        (vec![run(page(1), 1, 5)], "has flags that say nothing clear"),
        (
            vec![run(page(1), 1, 12)],
            "has flags that say nothing clear",
        ),
    ];
    for (entries, problem) in cases {
        let dir = tempfile::tempdir().expect("scratch");
        write_foreign(dir.path(), &entries);
        let error = source(dir.path()).expect_err(problem).to_string();
        assert!(error.contains(problem), "{error}");
        assert!(error.contains("pagemap-7.img, entry "), "{error}");
    }
}

fn runs() -> impl Strategy<Value = Vec<(u64, u64, PageFlags)>> {
    let flags = prop_oneof![
        Just(PRESENT),
        Just(PageFlags::LAZY),
        Just(PRESENT | PageFlags::LAZY)
    ];
    proptest::collection::vec((0u64..4, 1u64..5, flags), 0..20).prop_map(|steps| {
        let mut next = 0;
        let step = |(gap, count, flags)| {
            let first = next + gap;
            next = first + count;
            (first, count, flags)
        };
        steps.into_iter().map(step).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn damaged_pagemaps_are_survived(
        runs in runs(),
        flips in proptest::collection::vec((any::<prop::sample::Index>(), 0u32..8), 0..6),
        cut in any::<prop::sample::Index>(),
    ) {
        let dir = tempfile::tempdir().expect("scratch");
        write_pages(dir.path(), None, &runs, 9);
        let path = dir.path().join("pagemap-7.img");
        let mut bytes = fs::read(&path).expect("read");
        for (index, bit) in flips {
            let at = index.index(bytes.len());
            bytes[at] ^= 1 << bit;
        }
        bytes.truncate(cut.index(bytes.len()) + 1);
        fs::write(&path, bytes).expect("write");
        if let Ok(found) = source(dir.path()) {
            // Whatever was made of it, every run lies inside its file.
            for run in found.runs() {
                if let PagePlace::Stored { file, offset, .. } = run.place {
                    let size = found.files()[file].file().expect("it is held").metadata().expect("metadata").len();
                    prop_assert!(offset + run.nr_pages * PAGE_SIZE <= size);
                }
            }
        }
    }

    #[test]
    fn every_page_is_found_where_it_was_put(runs in runs()) {
        let dir = tempfile::tempdir().expect("scratch");
        write_pages(dir.path(), None, &runs, 9);
        let found = source(dir.path()).expect("source");
        let mut offset = 0;
        for (first, count, flags) in &runs {
            for number in *first..first + count {
                let run = found.run_at(page(number)).expect("page");
                match run.place {
                    PagePlace::Remote => prop_assert_eq!(*flags, PageFlags::LAZY),
                    PagePlace::Stored { offset: at, .. } => {
                        prop_assert_eq!(at + page(number) - run.vaddr, offset);
                        offset += PAGE_SIZE;
                    }
                }
            }
        }
        let total: u64 = found.runs().iter().map(|r| r.nr_pages).sum();
        prop_assert_eq!(total, runs.iter().map(|r| r.1).sum::<u64>());
    }
}
