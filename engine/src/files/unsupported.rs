//! Descriptors of kinds that are not saved: what they are, in words.

use firn_sys::file::{S_IFBLK, S_IFCHR, S_IFSOCK};

use super::external;
use super::open_file::{OpenFile, Trouble};
use super::sockets::{is_internet, protocol_name};

/// What links of dma-bufs begin with.
const DMA_BUF: &[u8] = b"/dmabuf:";

/// Says why the file can't be dumped.
pub(super) fn trouble(file: &OpenFile) -> Trouble {
    let (kind, reason) = describe(file);
    let mut hint = hint_for(kind.as_deref()).to_owned();
    if is_internet(file) {
        let link = file.link_text();
        hint += &format!(
            ", or add --external '{link}' here and --inherit-fd 'fd[N]:{link}' to the restore, which gives it another"
        );
    }
    if is_terminal(file) {
        let key = external::tty_key(file.stat.rdev, file.stat.dev);
        hint += &format!(
            ", or add --external '{key}' here and --inherit-fd 'fd[N]:{key}' to the restore, which gives it this \
             terminal or another"
        );
    } else if is_driver_file(file) {
        hint += ", or dump by a program that gives the engine a plugin for it (firn_engine::files::plugin)";
    }
    Trouble {
        kind,
        reason: reason.to_owned(),
        hint: Some(hint),
    }
}

/// What to do about a socket of a protocol. Go programs listen with Multipath TCP without being told to.
fn hint_for(protocol: Option<&str>) -> &'static str {
    match protocol {
        Some("MPTCP" | "MPTCPv6") => {
            "start the program without Multipath TCP (GODEBUG=multipathtcp=0 for Go), or let it close the socket"
        }
        Some("SMC" | "SMC6") => "start the program without smc_run, or let it close the socket",
        _ => "let the task close it before the dump",
    }
}

/// Whether a driver has made the file, so that somebody else may know how to save it.
fn is_driver_file(file: &OpenFile) -> bool {
    file.stat.file_type() == S_IFCHR || file.link.starts_with(DMA_BUF)
}

/// Whether the file is a terminal of hardware: a serial line, or a console of the screen.
fn is_terminal(file: &OpenFile) -> bool {
    if file.stat.file_type() != S_IFCHR || !file.link.starts_with(b"/") {
        return false;
    }
    let (major, _) = file.stat.device();
    let drivers = std::fs::read_to_string("/proc/tty/drivers").unwrap_or_default();
    // A name, a path, a major number, and more.
    let majors = drivers
        .lines()
        .filter_map(|line| line.split_whitespace().nth(2));
    let mut terminals = majors.filter_map(|number| number.parse::<u32>().ok());
    terminals.any(|terminal| terminal == major)
}

fn describe(file: &OpenFile) -> (Option<String>, &'static str) {
    let link = String::from_utf8_lossy(&file.link).into_owned();
    if file.is_path_only() {
        return (
            None,
            "O_PATH descriptors of files of this kind are not saved",
        );
    }
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
    if file.link.starts_with(DMA_BUF) {
        return (
            Some("dma-buf".to_owned()),
            "buffers of devices are not saved",
        );
    }
    if is_terminal(file) {
        return (
            device(file),
            "serial lines and virtual consoles are not opened by themselves",
        );
    }
    if link.starts_with('/') {
        return (device(file), "open files of this driver are not saved");
    }
    (None, "files of this kind are not saved")
}

fn device(file: &OpenFile) -> Option<String> {
    let (major, minor) = file.stat.device();
    Some(format!("device {major}:{minor}"))
}

fn anon_inode_reason(name: &str) -> &'static str {
    match name {
        "perf_event" => "performance counters are not saved",
        "userfaultfd" => "userfaultfds are not saved",
        "bpf-prog" => "BPF programs are not saved",
        "bpf_link" => "links of BPF programs are not saved",
        "btf" => "descriptions of types (BTF) are not saved",
        _ => "files of this kind are not saved",
    }
}

#[cfg(test)]
mod tests {
    use firn_sys::Pid;

    use super::super::open_file::ProcLink;
    use super::*;

    #[test]
    fn buffers_of_devices_are_refused_by_name() {
        // A file as that of a dma-buf is, without a device of its own, and the link that the kernel gives one.
        let cwd = OpenFile::of_link(Pid::this(), ProcLink::Cwd, 0).expect("we are somewhere");
        let file = OpenFile {
            link: b"/dmabuf:camera".to_vec(),
            ..cwd
        };
        let trouble = trouble(&file);
        assert_eq!(trouble.kind.as_deref(), Some("dma-buf"));
        assert_eq!(trouble.reason, "buffers of devices are not saved");
        let hint = trouble.hint.expect("one may do something");
        assert!(hint.contains("a plugin for it"), "{hint}");
    }
}
