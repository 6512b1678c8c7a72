//! The open files of an image set, to be restored.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use firn_images::{ImageDir, ImageKind};
use firn_proto::{FdTypes, FdinfoEntry, FileEntry, FileLockEntry, RegFileEntry};
use firn_sys::rlimit::RaisedDescriptorLimit;
use firn_sys::{Pid, file};

use super::autofs::Automounts;
use super::bpf::Maps;
use super::entries::{self, Entries};
use super::error::FileRestoreError;
use super::external::{self, Inherited};
use super::fifo::Fifos;
use super::ghost_restore::{GhostName, StandIns};
use super::ids::IdSet;
use super::late::LateFiles;
use super::memfd::MemfdRestore;
use super::open::{self, Opener};
use super::open_file::FDS_PER_THREAD;
use super::pidfd::Departed;
use super::pipe::Pipes;
use super::pty::{ControlledSession, Ptys};
use super::remap::{self, Remap};
use super::shelf::{Held, OpenedFiles, Room, Source};
use super::sockets::{self, RestoredNetwork, SocketSet};
use super::tables::Tables;
use super::tty::{self, TerminalInfos};
use super::{FileRestoreOptions, io_uring, kind, link_remap, task_files, validate};
use crate::crew;

/// Files that are opened beside others, before their shelf is there, at the most.
const MOST_PLAIN: usize = 4096;

/// The open files of a set: read, checked, and opened, in this order.
///
/// What it has opened is closed when it is dropped.
pub struct FileStore {
    pub(super) images: ImageDir,
    entries: Entries,
    /// Descriptors by files id.
    tables: Tables,
    remaps: HashMap<u32, Remap>,
    terminals: TerminalInfos,
    pub(super) terminal_sessions: Vec<ControlledSession>,
    pub(super) opened: OpenedFiles,
    /// Pids that the tree is going to have.
    pub(super) wanted_pids: Arc<HashSet<Pid>>,
    pub(super) late_files: LateFiles,
    pub(super) locks: Vec<FileLockEntry>,
    /// Table of each task.
    table_of: HashMap<Pid, u32>,
    links: HashMap<(u32, u32), OwnedFd>,
    /// /dev/null, for tasks that have to write to nowhere while they are made.
    null: Option<OwnedFd>,
    pub(super) options: FileRestoreOptions,
    pub(super) limit: Option<RaisedDescriptorLimit>,
    network: RestoredNetwork,
    inherited: Inherited,
    /// What BPF maps have lost.
    map_losses: Vec<String>,
    pub(super) automounts: Automounts,
}

impl FileStore {
    /// Reads all images of open files.
    ///
    /// # Errors
    /// Images that can't be read, contradict themselves, or hold kinds that are not restored.
    pub fn load(images: &ImageDir) -> Result<FileStore, FileRestoreError> {
        let entries = Entries::read(images)?;
        let tables = Tables::read(images, &entries)?;
        let remaps = images.read_all(ImageKind::RemapFpath, 0)?;
        let remaps = remap::by_file(&remaps, &entries)?;
        let store = FileStore {
            images: images.clone(),
            entries,
            tables,
            remaps,
            terminals: tty::by_id(images.read_all(ImageKind::TtyInfo, 0)?),
            terminal_sessions: Vec::new(),
            opened: OpenedFiles::default(),
            wanted_pids: Arc::default(),
            late_files: LateFiles::new(),
            locks: images.read_all(ImageKind::FileLocks, 0)?,
            table_of: HashMap::new(),
            links: HashMap::new(),
            null: None,
            options: FileRestoreOptions::default(),
            limit: None,
            network: RestoredNetwork::default(),
            inherited: Inherited::default(),
            map_losses: Vec::new(),
            automounts: Automounts::default(),
        };
        store.check_watches()?;
        Ok(store)
    }

    /// Checks that all files are there and the same as at the dump. `executables` are the numbers of
    /// entries that tasks run. Returns warnings about what could not be compared.
    ///
    /// # Errors
    /// The first file that is missing or has changed.
    pub fn check(
        &self,
        options: &FileRestoreOptions,
        executables: &[u32],
    ) -> Result<Vec<String>, FileRestoreError> {
        let given = &options.inherit;
        let mut warnings =
            external::check(given, self.entries.all(), &self.terminals, &self.images)?;
        let executables: HashSet<u32> = executables.iter().copied().collect();
        let replaced = self.terminal_paths();
        let mut entries: Vec<&RegFileEntry> = self.entries.regular().collect();
        entries.sort_by_key(|entry| (!executables.contains(&entry.id), entry.id));
        // Files of tasks are there when their tasks are.
        entries.retain(|entry| {
            !self.remaps.contains_key(&entry.id)
                && !replaced.contains(&entry.id)
                && !external::is_given(entry, given)
                && task_files::task_of(&entry.name).is_none()
        });
        let check = |entry: &&RegFileEntry| {
            let role = match executables.contains(&entry.id) {
                true => "executable",
                false => "file",
            };
            validate::check(&open::path_of(entry, options), entry, role, options)
        };
        let checked = crew::share_out(&entries, FDS_PER_THREAD, check);
        checked.into_iter().collect::<Result<(), _>>()?;
        let lacks_mtime = |entry: &&&RegFileEntry| validate::lacks_mtime(entry, options);
        let nr_without_mtime = entries.iter().filter(lacks_mtime).count();
        if nr_without_mtime > 0 {
            warnings.push(format!(
                "{nr_without_mtime} files were compared by size only: the images do not say when they were \
                 last written to"
            ));
        }
        warnings.extend(io_uring::check(self.entries.all())?);
        Ok(warnings)
    }

    /// Entries with paths of terminals, which are replaced by another one.
    fn terminal_paths(&self) -> HashSet<u32> {
        let entries = self.entries.all();
        entries
            .filter_map(|entry| entry.tty.as_ref()?.regf_id)
            .collect()
    }

    /// Opens every file of the tables, and every file that has no name, once.
    ///
    /// All of them are close-on-exec descriptors of this process, inherited by a fork. On an error
    /// nothing is left behind.
    ///
    /// # Errors
    /// A file that can't be opened or made.
    pub fn open_all(
        &mut self,
        options: &FileRestoreOptions,
        shared: &dyn MemfdRestore,
    ) -> Result<(), FileRestoreError> {
        self.options = options.clone();
        let room = self.make_room()?;
        let keys = self.keys_to_open()?;
        let inventory = self.images.inventory()?;
        let closes_tcp = inventory.tcp_close == Some(true);
        self.network = RestoredNetwork::lock(&self.entries, &inventory, options)?;
        self.inherited = Inherited::take(&options.inherit, &self.images)?;
        let inherited = &self.inherited;
        let nr_ends = self.nr_ends(&keys);
        let pipes = || Pipes::load(&self.images, inherited, nr_ends, &room);
        // What is given, or lies beneath a mount that is to be made, comes in its order.
        let has_plain = inherited.is_empty() && !Automounts::are_in(&self.entries);
        let (plain, pipes) = match has_plain {
            true => crew::both(|| self.open_plain(&keys, &room), pipes),
            false => (Ok(Vec::new()), pipes()),
        };
        let (plain, mut pipes) = (plain?, pipes?);
        // Other files may be beneath the mounts.
        self.automounts = Automounts::open(&self.entries, &keys, &mut pipes, inherited, options)?;
        let mut opener = Opener {
            inherited,
            root_ids: inventory.root_ids,
            entries: &self.entries,
            options,
            shared,
            stand_ins: self.make_stand_ins(options)?,
            pipes,
            fifos: Fifos::new(&room),
            terminals: &self.terminals,
            sockets: SocketSet::make(
                &self.entries,
                &self.images,
                inherited,
                options,
                closes_tcp,
                &room,
            )?,
            departed: Departed::default(),
            ptys: Ptys::load(&self.images)?,
            late_files: LateFiles::new(),
            maps: Maps::load(&self.images)?,
        };
        let mut opened = OpenedFiles::new(room);
        for (id, fd) in plain {
            opened.insert((FdTypes::Reg, id), fd)?;
        }
        for key in keys {
            if opened.contains(&key) {
                continue;
            }
            let (fd_type, id) = key;
            let entry = self.entries.get(fd_type, id);
            let entry = entry.ok_or_else(|| FileRestoreError::corrupt(id, "it is missing"))?;
            let given = inherited.in_place_of(entry, opener.terminals, &mut opener.ptys)?;
            let kind = kind::of_type(fd_type).ok_or_else(|| entries::unsupported(fd_type, id))?;
            let fd = given.map_or_else(|| kind.open(entry, &mut opener), Ok)?;
            opened.insert(key, fd)?;
        }
        opener.fifos.fill(&self.images)?;
        opener
            .ptys
            .finish(opener.terminals, options.orphan_masters.as_ref())?;
        self.late_files = std::mem::take(&mut opener.late_files);
        self.terminal_sessions = std::mem::take(&mut opener.ptys.sessions);
        self.map_losses = std::mem::take(&mut opener.maps.losses);
        let sockets = opener.sockets;
        let finished = sockets.finish(&opened)?;
        self.network.rest(finished);
        opened.settle(|(kind, id)| {
            // They are replaced under their numbers, or mapped before the tasks have their tables.
            let is_mapped = matches!(kind, FdTypes::FirnUring | FdTypes::Packetsk);
            is_mapped || self.late_files.contains_key(&((*kind).into(), *id))
        })?;
        self.opened = opened;
        self.check_free_numbers()?;
        self.set_leases()
    }

    /// Opens files that are found by their path and by nothing else: as many as may be open beside all others.
    fn open_plain(
        &self,
        keys: &[(FdTypes, u32)],
        room: &Room,
    ) -> Result<Vec<(u32, OwnedFd)>, FileRestoreError> {
        let removed: HashSet<u32> = self.entries.removed_names().map(|(e, _)| e.id).collect();
        let plain = |&(fd_type, id): &(FdTypes, u32)| {
            let entry = self
                .entries
                .get(fd_type, id)
                .filter(|_| fd_type == FdTypes::Reg)?;
            let reg = entry.reg.as_ref()?;
            let has_stand_in = self.remaps.contains_key(&id) || removed.contains(&id);
            let is_other = reg.ext == Some(true) || task_files::task_of(&reg.name).is_some();
            (!has_stand_in && !is_other).then_some(reg)
        };
        let most = room.nr_here.map_or(MOST_PLAIN, |nr| MOST_PLAIN.min(nr / 4));
        let plain = keys.iter().filter_map(plain).take(most);
        let open = |entry: &RegFileEntry| {
            let path = open::path_of(entry, &self.options);
            Ok((entry.id, open::open_entry_at(&path, entry, entry.flags)?))
        };
        plain.map(open).collect()
    }

    /// What open files have lost, a sentence each: options of sockets, datagrams, memberships, pins of BPF maps.
    ///
    /// **Preconditions**: after [`FileStore::open_all`].
    ///
    /// # Errors
    /// A file is kept elsewhere and can't be fetched.
    pub fn losses(&self) -> Result<Vec<String>, FileRestoreError> {
        let mut lost = self.network.losses(&self.entries, &self.opened)?;
        lost.extend_from_slice(&self.map_losses);
        Ok(lost)
    }

    /// Makes TCP connections complete, while the network lock still drops what they send.
    ///
    /// # Errors
    /// A connection could not go on. The lock stays for another restore.
    pub fn wake_connections(&mut self) -> Result<(), FileRestoreError> {
        self.network.wake(&self.opened)
    }

    /// Lifts the network lock, for the moment when the tasks no longer die with this process.
    pub fn free_network(&mut self) {
        self.network.free(&self.opened);
    }

    /// Whether something is to be done when the tasks live already, or to be taken back if they never do.
    pub fn leaves_work(&self) -> bool {
        let is_link = |remap: &Remap| matches!(remap, Remap::Link(_));
        self.network.is_locked() || self.automounts.were_made() || self.remaps.values().any(is_link)
    }

    /// Everything in a table or in a message, and everything whose stand-in is about to vanish; in the
    /// order in which they are opened.
    fn keys_to_open(&self) -> Result<Vec<(FdTypes, u32)>, FileRestoreError> {
        let described = self.tables().flat_map(|(_, table)| table);
        let described =
            described.filter_map(|fd| Some((FdTypes::try_from(fd.r#type).ok()?, fd.id)));
        let renamed = self.entries.removed_names().map(|(entry, _)| entry.id);
        let standing = self.remaps.keys().copied().chain(renamed);
        let standing = standing.map(|id| (FdTypes::Reg, id));
        let sent: HashSet<u32> = sockets::files_in_flight(&self.images)?
            .into_iter()
            .collect();
        let sent = self.entries.keys().filter(|(_, id)| sent.contains(id));
        let keys: IdSet<(FdTypes, u32)> = described.chain(standing).chain(sent).collect();
        let mut keys: Vec<_> = keys.into_iter().collect();
        self.sort_for_opening(&mut keys);
        Ok(keys)
    }

    fn make_stand_ins(&self, options: &FileRestoreOptions) -> Result<StandIns, FileRestoreError> {
        let mut stand_ins = StandIns::default();
        let mut ghosts: BTreeMap<u32, Vec<GhostName>> = BTreeMap::new();
        let mut remaps: Vec<(&u32, &Remap)> = self.remaps.iter().collect();
        remaps.sort_by_key(|(id, _)| **id);
        for (&id, remap) in remaps {
            let entry = self.path_entry(id)?;
            let old = open::path_of(entry, options);
            match *remap {
                Remap::Ghost(ghost_id) => ghosts.entry(ghost_id).or_default().push(GhostName {
                    id,
                    old,
                    flags: entry.flags,
                }),
                Remap::Link(link_id) => {
                    let link = open::path_of(self.path_entry(link_id)?, options);
                    stand_ins.stand_in(id, &link, &old)?;
                }
                Remap::Departed(task) => stand_ins.stand_in_task(id, task, &entry.name)?,
            }
        }
        for (entry, removed) in self.entries.removed_names() {
            let old = open::local_path(removed, options);
            stand_ins.stand_in(entry.id, &open::path_of(entry, options), &old)?;
        }
        for (ghost_id, names) in &ghosts {
            stand_ins.make_ghost(&self.images, *ghost_id, names)?;
        }
        Ok(stand_ins)
    }

    pub(super) fn path_entry(&self, id: u32) -> Result<&RegFileEntry, FileRestoreError> {
        let entry = self.entries.get(FdTypes::Reg, id);
        entry
            .and_then(|entry| entry.reg.as_ref())
            .ok_or_else(|| FileRestoreError::corrupt(id, "its path is missing"))
    }

    /// A descriptor of a file that tasks hold without one (executable, directory, mapping), opened with
    /// the flags of its entry or with others. It stays open and belongs to the store.
    ///
    /// # Errors
    /// The file can't be opened.
    pub fn link_fd(&mut self, id: u32, flags: Option<u32>) -> Result<RawFd, FileRestoreError> {
        let entry = self.path_entry(id)?;
        let flags = flags.unwrap_or(entry.flags);
        if let Some(fd) = self.links.get(&(id, flags)) {
            return Ok(fd.as_raw_fd());
        }
        let fd = match self.opened.get(&(FdTypes::Reg, id))? {
            Some(Held::Here(fd)) if flags == entry.flags => return Ok(fd.as_raw_fd()),
            Some(Held::Fetched(fd)) if flags == entry.flags => fd,
            // It may have no name any more.
            Some(fd) => open::reopen(fd, flags, "a deleted file")?,
            None => match self.inherited.open_file(entry, flags)? {
                Some(fd) => fd,
                None => open::open_path(&open::path_of(entry, &self.options), flags)?,
            },
        };
        let raw = fd.as_raw_fd();
        self.links.insert((id, flags), fd);
        Ok(raw)
    }

    /// A descriptor of /dev/null, open for writing; it belongs to the store.
    ///
    /// # Errors
    /// It can't be opened.
    pub fn null_fd(&mut self) -> Result<RawFd, FileRestoreError> {
        if let Some(null) = &self.null {
            return Ok(null.as_raw_fd());
        }
        const NULL: &str = "/dev/null";
        let flags = (file::O_RDWR | file::O_CLOEXEC).cast_unsigned();
        let null =
            file::open(NULL.as_ref(), flags).map_err(FileRestoreError::refused("open", NULL))?;
        Ok(self.null.insert(null).as_raw_fd())
    }

    /// The descriptor of an io_uring ring; None for a file that is none.
    pub fn ring_fd(&self, id: u32) -> Option<RawFd> {
        self.opened.number_here(&(FdTypes::FirnUring, id))
    }

    /// Descriptor of a packet socket, whose rings are to be mapped; None where there is none.
    pub fn packet_fd(&self, id: u32) -> Option<RawFd> {
        self.opened.number_here(&(FdTypes::Packetsk, id))
    }

    /// Number in memfd.img of the memory file behind a file; None where it is no memory file.
    pub fn memfd_inode(&self, id: u32) -> Option<u32> {
        let memfd = self.entries.get(FdTypes::Memfd, id)?.memfd.as_ref()?;
        Some(memfd.inode_id)
    }

    /// Removes the names that the dump made for files with unknown other names (link remaps). For the end
    /// of a restore that succeeded: until then another attempt needs them.
    pub fn remove_link_remaps(&self) {
        for remap in self.remaps.values() {
            let Remap::Link(id) = remap else { continue };
            let Ok(entry) = self.path_entry(*id) else {
                continue;
            };
            let path = open::path_of(entry, &self.options);
            let name = path.file_name().and_then(|name| name.to_str());
            // Several entries may share one name, so it may be gone already.
            if name.is_some_and(|name| name.starts_with(link_remap::PREFIX))
                && let Err(error) = std::fs::remove_file(&path)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                tracing::warn!("cannot remove {}: {error}", path.display());
            }
        }
    }

    /// The entry of that type and number.
    pub(super) fn entry(&self, fd_type: FdTypes, id: u32) -> Option<&FileEntry> {
        self.entries.get(fd_type, id)
    }

    /// All entries with open files.
    pub(super) fn opened_entries(&self) -> impl Iterator<Item = &FileEntry> {
        let opened = self.opened.keys();
        opened.filter_map(|(kind, id)| self.entries.get(kind, id))
    }

    /// Says which pids the tree is going to have, so that no helper takes one.
    pub fn expect_pids(&mut self, pids: HashSet<Pid>) {
        self.wanted_pids = Arc::new(pids);
    }

    /// Says which table a task has, which locks are told by.
    pub fn assign_table(&mut self, pid: Pid, files_id: u32) {
        self.table_of.insert(pid, files_id);
    }

    /// All tasks with the numbers of their tables, in no order.
    pub(super) fn tasks_with_tables(&self) -> impl Iterator<Item = (Pid, u32)> {
        self.table_of.iter().map(|(pid, table)| (*pid, *table))
    }

    /// The table of a task.
    pub(super) fn table_of(&self, pid: Pid) -> Option<u32> {
        self.table_of.get(&pid).copied()
    }

    /// The open file of a table entry.
    pub(super) fn opened_by(&self, fd: &FdinfoEntry) -> Result<Option<Held<'_>>, FileRestoreError> {
        Ok(self.opened.get(&(fd.r#type(), fd.id))?)
    }

    /// The open file of an entry.
    pub(super) fn opened(
        &self,
        fd_type: FdTypes,
        id: u32,
    ) -> Result<Option<Held<'_>>, FileRestoreError> {
        Ok(self.opened.get(&(fd_type, id))?)
    }

    /// Whether the other side of a pipe is outside of the tree.
    pub(super) fn is_external(&self, fd_type: FdTypes, id: u32) -> bool {
        let pipe = self
            .entry(fd_type, id)
            .and_then(|entry| entry.pipe.as_ref());
        pipe.is_some_and(|pipe| self.inherited.has_pipe(pipe.pipe_id))
    }

    /// Ghosts: the entries that stand for each.
    pub(super) fn ghosts(&self) -> impl Iterator<Item = (u32, u32)> {
        self.remaps.iter().filter_map(|(id, remap)| match remap {
            Remap::Ghost(ghost) => Some((*ghost, *id)),
            Remap::Link(_) | Remap::Departed(_) => None,
        })
    }

    /// The descriptors of a table; none for a number that has no image.
    pub(super) fn table(&self, files_id: u32) -> &[FdinfoEntry] {
        self.tables.get(files_id)
    }

    /// All tables by files id, ascending.
    pub(super) fn tables(&self) -> impl Iterator<Item = (u32, &[FdinfoEntry])> {
        self.tables.iter()
    }

    /// Whether table `files_id` is the first with the open file behind one of its entries.
    pub(super) fn is_first(&self, files_id: u32, fd: &FdinfoEntry) -> bool {
        self.tables.is_first(files_id, fd)
    }

    /// Where a task finds the open file behind a table entry.
    pub(super) fn source(&self, fd: &FdinfoEntry) -> Option<Source> {
        self.opened.source(&(fd.r#type(), fd.id))
    }
}
