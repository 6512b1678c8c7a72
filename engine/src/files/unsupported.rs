//! Descriptors of kinds that are not saved: what they are, in words.

use firn_sys::file::{S_IFBLK, S_IFSOCK};

use super::open_file::{OpenFile, Trouble};
use super::sockets::protocol_name;

/// Says why the file can't be dumped.
pub(super) fn trouble(file: &OpenFile) -> Trouble {
    let (kind, reason) = describe(file);
    Trouble {
        kind,
        reason: reason.to_owned(),
        hint: Some("let the task close it before the dump".to_owned()),
    }
}

fn describe(file: &OpenFile) -> (Option<String>, &'static str) {
    let link = String::from_utf8_lossy(&file.link).into_owned();
    if file.stat.file_type() == S_IFSOCK {
        return (
            protocol_name(file),
            "sockets of this protocol are not saved",
        );
    }
    if let Some(name) = link.strip_prefix("anon_inode:") {
        return (None, anon_inode_reason(name.trim_matches(['[', ']'])));
    }
    if file.stat.file_type() == S_IFBLK {
        return (device(file), "open block devices are not saved");
    }
    if link.starts_with('/') {
        return (device(file), "open files of this driver are not saved");
    }
    if link.ends_with(']') {
        return (None, "open namespaces are not saved");
    }
    (None, "files of this kind are not saved")
}

fn device(file: &OpenFile) -> Option<String> {
    let (major, minor) = file.stat.device();
    Some(format!("device {major}:{minor}"))
}

fn anon_inode_reason(name: &str) -> &'static str {
    match name {
        "io_uring" => "io_uring rings are not saved",
        "perf_event" => "performance counters are not saved",
        "userfaultfd" => "userfaultfds are not saved",
        name if name.starts_with("bpf") => "BPF objects are not saved",
        _ => "files of this kind are not saved",
    }
}
