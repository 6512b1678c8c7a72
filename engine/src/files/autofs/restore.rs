//! New pipes for the mounts of an automounter.
//!
//! This process opens each mount, or makes it where it is gone, with itself in the automounter's place; a task of
//! the automounter's group fetches it and takes the place. Only who is in the group may, and only for itself.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use firn_proto::{FdTypes, FileEntry, FirnAutofsEntry};
use firn_sys::autofs::{self, Control};
use firn_sys::deputy::Deputy;
use firn_sys::{Pid, nr};

use super::super::FileRestoreOptions;
use super::super::entries::Entries;
use super::super::error::FileRestoreError;
use super::super::external::Inherited;
use super::super::late::{Coordinator, close};
use super::super::mounts;
use super::super::open::local_path;
use super::super::pipe::Pipes;
use super::super::room::free_numbers;
use super::super::store::FileStore;
use super::mount::options_of;
use crate::program::{Program, Rule};
use crate::task::status::Stat;

/// Free numbers that the fetching itself may need.
const SPARE: usize = 4;

/// The mounts of a restore. Dropping them takes away those that it has made, until they are kept.
#[derive(Debug, Default)]
pub(in crate::files) struct Automounts {
    control: Option<Control>,
    mounts: Vec<Served>,
    /// Takes mounts away that were made, if this process is killed.
    deputy: Option<Deputy>,
}

/// A mount and what makes it answer again.
#[derive(Debug)]
struct Served {
    /// Number of the pipe's entry.
    id: u32,
    pgrp: Pid,
    mount: OwnedFd,
    writer: OwnedFd,
    /// Where it was made.
    made: Option<CString>,
    is_planned: bool,
}

impl Automounts {
    /// Whether an image has any.
    pub(in crate::files) fn are_in(entries: &Entries) -> bool {
        let firn = |entry: &FileEntry| {
            entry
                .pipe
                .as_ref()?
                .firn
                .as_ref()?
                .autofs
                .as_ref()
                .map(drop)
        };
        entries.all().any(|entry| firn(entry).is_some())
    }

    /// Opens the mounts of these files, and makes those that are gone.
    ///
    /// # Errors
    /// The kernel refuses to mount or open one.
    pub(in crate::files) fn open(
        entries: &Entries,
        keys: &[(FdTypes, u32)],
        pipes: &mut Pipes,
        inherited: &Inherited,
        options: &FileRestoreOptions,
    ) -> Result<Automounts, FileRestoreError> {
        let mut set = Automounts::default();
        let mut found = Vec::new();
        for (kind, id) in keys {
            let pipe = entries
                .get(*kind, *id)
                .and_then(|entry| entry.pipe.as_ref());
            let Some(pipe) = pipe.filter(|pipe| !inherited.has_pipe(pipe.pipe_id)) else {
                continue;
            };
            if let Some(entry) = pipe.firn.as_ref().and_then(|firn| firn.autofs.as_ref()) {
                found.push((
                    *id,
                    entry,
                    pipe.pipe_id,
                    local_path(&entry.mount_point, options),
                ));
            }
        }
        let gone = found
            .iter()
            .filter(|(.., entry, _, path)| device_at(path, entry).is_none());
        let gone: Vec<_> = gone.map(|(_, entry, _, path)| (*entry, path)).collect();
        set.deputy = (!gone.is_empty()).then(|| appoint(&gone)).flatten();
        for (id, entry, pipe, path) in &found {
            set.add(*id, entry, pipes.writer(*pipe)?, path)?;
        }
        Ok(set)
    }

    /// Whether some were made that are not kept yet.
    pub(in crate::files) fn were_made(&self) -> bool {
        self.mounts.iter().any(|served| served.made.is_some())
    }

    fn add(
        &mut self,
        id: u32,
        entry: &FirnAutofsEntry,
        writer: OwnedFd,
        path: &Path,
    ) -> Result<(), FileRestoreError> {
        let refused = |action| FileRestoreError::refused(action, path.display().to_string());
        let control = match self.control.take() {
            Some(control) => control,
            None => Control::open().map_err(FileRestoreError::refused("open", "/dev/autofs"))?,
        };
        let control = self.control.insert(control);
        let target = c_string(path.as_os_str().as_bytes());
        let mut made = None;
        let device = match device_at(path, entry) {
            Some(device) => device,
            None => {
                make(entry, &writer, &target).map_err(refused("mount an autofs filesystem at"))?;
                made = Some(target.clone());
                device_at(path, entry).unwrap_or_default()
            }
        };
        let device = (device >> 20, device & 0xf_ffff);
        let mount = control.open_mount(&target, device);
        let served = mount.and_then(|mount| {
            if made.is_some() {
                control.set_timeout(&mount, options_of(entry, 0, Pid::this()).1)?;
            }
            Ok(mount)
        });
        match served {
            Ok(mount) => self.mounts.push(Served {
                id,
                pgrp: Pid::from_image(entry.pgrp),
                mount,
                writer,
                made,
                is_planned: false,
            }),
            Err(errno) => {
                unmake(made.as_ref());
                return Err(refused("open the automount at")(errno));
            }
        }
        Ok(())
    }
}

/// Somebody who takes these mounts, which are not there yet, away if this process is killed.
fn appoint(gone: &[(&FirnAutofsEntry, &PathBuf)]) -> Option<Deputy> {
    let appointed = Deputy::appoint(|_| {
        for (entry, path) in gone.iter().rev() {
            if device_at(path, entry).is_some() {
                unmake(Some(&c_string(path.as_os_str().as_bytes())));
            }
        }
    });
    let told = appointed.inspect_err(|errno| {
        tracing::info!("automounts would stay if this restore were killed: {errno}");
    });
    told.ok()
}

/// The device of the mount of an entry, the uppermost one, if it is there still.
fn device_at(path: &Path, entry: &FirnAutofsEntry) -> Option<u32> {
    let mut mounts = mounts::here().into_iter().rev();
    let found = mounts.find(|mount| {
        mount.path == path && mount.kind == b"autofs" && mount.source == entry.source
    });
    found.map(|mount| mount.dev)
}

/// Mounts it, for now with the process group of this process in the automounter's place.
fn make(entry: &FirnAutofsEntry, writer: &OwnedFd, target: &CString) -> firn_sys::Result<()> {
    let own = Stat::read(Pid::this()).map_or(Pid::this(), |stat| stat.pgid);
    let (options, _) = options_of(entry, writer.as_raw_fd(), own);
    autofs::mount(
        &c_string(&entry.source),
        target,
        &c_string(options.as_bytes()),
    )
}

fn unmake(made: Option<&CString>) {
    if let Some(Err(errno)) = made.map(|target| autofs::unmount(target)) {
        tracing::warn!("{} stays mounted: {errno}", target_text(made));
    }
}

fn target_text(target: Option<&CString>) -> String {
    target.map_or_else(String::new, |target| target.to_string_lossy().into_owned())
}

/// What is behind a NUL in an image is no part of a name.
fn c_string(bytes: &[u8]) -> CString {
    let end = bytes
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(bytes.len());
    CString::new(&bytes[..end]).expect("cut at the first NUL")
}

impl Drop for Automounts {
    fn drop(&mut self) {
        for served in self.mounts.iter().rev() {
            unmake(served.made.as_ref());
        }
    }
}

impl FileStore {
    /// Appends the records that make a task the automounter of the mounts of its group, if none is yet.
    ///
    /// They run in a task that has table `files_id` and still has its first rights.
    pub fn plan_automounts(&mut self, pgid: Pid, files_id: u32, program: &mut Program) {
        let free = free_numbers(self.table(files_id)).skip(SPARE).take(3);
        let &[control, mount, pipe] = &free.collect::<Vec<u32>>()[..] else {
            unreachable!("numbers are more than files")
        };
        let Some(device) = self
            .automounts
            .control
            .as_ref()
            .map(|c| c.as_fd().as_raw_fd())
        else {
            return;
        };
        let served = self.automounts.mounts.iter_mut();
        for served in served.filter(|served| served.pgrp == pgid && !served.is_planned) {
            let coordinator = Coordinator::reach(program);
            coordinator.fetch(program, device, control, 0, "the automounts' control");
            coordinator.fetch(program, served.mount.as_raw_fd(), mount, 0, "the automount");
            coordinator.fetch(program, served.writer.as_raw_fd(), pipe, 0, "its pipe");
            let steps = [
                (autofs::CATATONIC, "silencing the automount"),
                (autofs::SET_PIPE, "giving the automount its pipe"),
            ];
            for (command, why) in steps {
                let mount = i32::try_from(mount).expect("numbers of descriptors fit");
                let request = program.data(&autofs::request(mount, pipe.into()));
                let args = [control.into(), command.into(), request.into()];
                program.call(nr::IOCTL, &args, Rule::Ok, why);
            }
            for fd in [control, mount, pipe] {
                close(program, fd.into(), "closing what the automount needed");
            }
            coordinator.let_go(program);
            served.is_planned = true;
        }
    }

    /// Looks whether every mount gets its automounter, when all programs are planned.
    ///
    /// # Errors
    /// The images have no task of its group.
    pub fn check_automounts(&self) -> Result<(), FileRestoreError> {
        match self.automounts.mounts.iter().find(|one| !one.is_planned) {
            None => Ok(()),
            Some(one) => {
                let what = format!("process group {} of an automounter is missing", one.pgrp);
                Err(FileRestoreError::corrupt(one.id, what))
            }
        }
    }

    /// Lets the mounts that were made stay: the tasks live without this process.
    pub fn keep_mounts(&mut self) {
        self.automounts.mounts.clear();
    }

    /// Who takes the mounts away if this process is killed; for when somebody else does.
    pub fn mounts_deputy(&mut self) -> Option<Deputy> {
        self.automounts.deputy.take()
    }

    /// Takes away the mounts that were made and are not kept.
    pub fn unmake_mounts(&mut self) {
        self.automounts = Automounts::default();
    }
}
