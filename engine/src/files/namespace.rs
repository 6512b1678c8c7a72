//! Descriptors of namespaces (/proc/PID/ns/NAME): opened again as those of the restoring process.
//!
//! All tasks share the namespaces of the dumper, and a restored tree those of the restorer. One of another
//! namespace, which only such a descriptor may keep alive, is refused. Images have the number that the
//! namespace has in the inventory, and the CLONE_NEW* flag of its kind.

use std::os::fd::OwnedFd;

use firn_proto::{FdTypes, FileEntry, NsFileEntry, TaskKobjIdsEntry};
use firn_sys::file::S_IFREG;

use super::FileDumpOptions;
use super::dump::DumpState;
use super::error::{FileDumpError, FileRestoreError};
use super::kind::{Dumping, FileKind};
use super::open::{self, Opener};
use super::open_file::{OpenFile, Trouble};
use crate::dump::root_ids;

/// Descriptors of namespaces.
pub(super) struct Namespace;

/// One kind of namespace.
struct Kind {
    /// What its links begin with, and its file in /proc/PID/ns.
    name: &'static str,
    /// CLONE_NEW*.
    flag: u32,
    id: fn(&TaskKobjIdsEntry) -> Option<u32>,
}

const fn kind(name: &'static str, flag: u32, id: fn(&TaskKobjIdsEntry) -> Option<u32>) -> Kind {
    Kind { name, flag, id }
}

const NAMESPACES: [Kind; 8] = [
    kind("time", 0x80, |ids| ids.time_ns_id),
    kind("mnt", 0x0002_0000, |ids| ids.mnt_ns_id),
    kind("cgroup", 0x0200_0000, |ids| ids.cgroup_ns_id),
    kind("uts", 0x0400_0000, |ids| ids.uts_ns_id),
    kind("ipc", 0x0800_0000, |ids| ids.ipc_ns_id),
    kind("user", 0x1000_0000, |ids| ids.user_ns_id),
    kind("pid", 0x2000_0000, |ids| ids.pid_ns_id),
    kind("net", 0x4000_0000, |ids| ids.net_ns_id),
];

/// The kind of a link such as `net:[4026531840]`.
fn kind_of(link: &[u8]) -> Option<&'static Kind> {
    let (name, rest) = std::str::from_utf8(link).ok()?.split_once(':')?;
    let number = rest.strip_prefix('[')?.strip_suffix(']')?;
    number.parse::<u64>().ok()?;
    NAMESPACES.iter().find(|kind| kind.name == name)
}

fn own_path(kind: &Kind) -> String {
    format!("/proc/self/ns/{}", kind.name)
}

impl FileKind for Namespace {
    fn fd_type(&self) -> FdTypes {
        FdTypes::Ns
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        file.stat.file_type() == S_IFREG && kind_of(&file.link).is_some()
    }

    fn trouble(&self, file: &OpenFile, _: &FileDumpOptions) -> Option<Trouble> {
        let kind = kind_of(&file.link)?;
        let own = std::fs::read_link(own_path(kind)).ok()?;
        let is_own = own.as_os_str().as_encoded_bytes() == file.link;
        (!is_own).then(|| {
            Trouble::new(
                format!(
                    "it is a {} namespace that the dump does not run in",
                    kind.name
                ),
                "let the task close it before the dump; namespaces of their own are not saved yet",
            )
        })
    }

    fn dump(
        &self,
        dumping: &Dumping<'_>,
        _: &mut DumpState<'_>,
    ) -> Result<FileEntry, FileDumpError> {
        let file = dumping.file;
        let kind = kind_of(&file.link).ok_or_else(|| file.unexpected("link"))?;
        let ns_id = (kind.id)(&root_ids()).ok_or_else(|| file.unexpected("link"))?;
        Ok(FileEntry {
            r#type: FdTypes::Ns.into(),
            id: dumping.id,
            nsf: Some(NsFileEntry {
                id: dumping.id,
                ns_id,
                ns_cflag: kind.flag,
                flags: file.image_flags(),
            }),
            ..FileEntry::default()
        })
    }

    fn open(
        &self,
        entry: &FileEntry,
        opener: &mut Opener<'_>,
    ) -> Result<OwnedFd, FileRestoreError> {
        let wanted = FileRestoreError::expect_member(entry, entry.nsf.as_ref(), "a namespace")?;
        let kind = NAMESPACES.iter().find(|kind| kind.flag == wanted.ns_cflag);
        let kind = kind.ok_or_else(|| {
            FileRestoreError::corrupt(entry.id, "it is a namespace of an unknown kind")
        })?;
        let root = opener.root_ids.as_ref().and_then(kind.id);
        if root.is_some_and(|root| root != wanted.ns_id) {
            return Err(FileRestoreError::Unsupported {
                id: entry.id,
                kind: "namespace of its own",
            });
        }
        open::open_path(own_path(kind).as_ref(), wanted.flags)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_tell_the_kind() {
        for kind in &NAMESPACES {
            let link = std::fs::read_link(own_path(kind)).expect("every process has one");
            let found = kind_of(link.as_os_str().as_encoded_bytes());
            assert_eq!(found.map(|kind| kind.name), Some(kind.name));
        }
        for other in ["pipe:[7]", "net:[x]", "net:7", "/net:[7]"] {
            assert!(kind_of(other.as_bytes()).is_none(), "{other}");
        }
    }
}
