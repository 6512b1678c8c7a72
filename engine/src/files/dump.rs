//! Collecting the open files of frozen tasks.

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use firn_images::{ImageKind, ImageSetWriter};
use firn_proto::{FdTypes, FdinfoEntry, FileEntry, FownEntry, RemapFilePathEntry};
use firn_sys::Pid;
use firn_sys::kcmp::{Resource, kcmp};
use firn_sys::rlimit::{self, RaisedDescriptorLimit};

use super::bpf::MapContents;
use super::build_id::BuildIds;
use super::describe::{Descriptions, NewFile};
use super::epoll::Unresolved;
use super::error::FileDumpError;
use super::ghost::Ghosts;
use super::io_uring::DumpedRings;
use super::link_remap::LinkRemaps;
use super::lock_watch::LockWatch;
use super::locks::Locks;
use super::memfd;
use super::open_file::{OpenFile, Place, ProcLink, Trouble};
use super::pipe_data::PipeContents;
use super::sockets::DumpedSockets;
use super::told::{QuickLook, ToldFd};
use super::tty::Terminals;
use super::watched::{Finder, Watched};
use super::{FileDumpOptions, autofs, outside, regular, sharing, survey};
use crate::inject::Journal;
use crate::kernel::LazyKernel;
use crate::memory::smaps::Mapping;
use crate::memory::{MappedFiles, SharedDump};
use crate::network_lock;
use crate::obstacle::Obstacle;
use crate::tree::{Task, Tree};

/// Number of the first dumped table: 1 is the dumper's own in CRIU's images.
const FIRST_FILES_ID: u32 = 2;

/// The open files of a tree, being dumped.
///
/// Dropping it takes back what was made for the dump (link remaps); [`FileTable::keep`] leaves it.
pub struct FileTable {
    pub(super) collected: Collected,
    /// By files id, sorted by kcmp: the task that was asked, and the id.
    sorted_tables: Vec<(Pid, u32)>,
    table_of: HashMap<Pid, u32>,
    pub(super) tables: Vec<(u32, Vec<FdinfoEntry>)>,
    pub(super) descriptions: Descriptions,
    links: HashMap<LinkKey, u32>,
    mapped: HashMap<MappingKey, u32>,
    mapped_memfds: HashMap<(u32, u32), u32>,
    pub(super) obstacles: Vec<Obstacle>,
    /// Files from messages in sockets, open so that they can be compared.
    pub(super) in_flight: Vec<OwnedFd>,
    /// Tells locks without asking for each file, where that is worth it.
    pub(super) lock_watch: Option<LockWatch>,
    pub(super) quick: Option<QuickLook>,
    /// What has been dumped, and is freed when there is time.
    #[expect(clippy::vec_box, reason = "the boxes are what is not to be freed")]
    pub(super) spent: Vec<Box<NewFile>>,
    /// Descriptors that the survey has seen and that are open still, with their flags, by task.
    pub(super) recalled: HashMap<Pid, (Vec<ToldFd>, Vec<bool>)>,
    run_id: String,
    /// Duplicates of the tasks' descriptors count, too.
    pub(super) limit: Option<RaisedDescriptorLimit>,
}

/// What all kinds collect for the images.
pub(super) struct Collected {
    pub(super) options: FileDumpOptions,
    pub(super) entries: Vec<FileEntry>,
    pub(super) ghosts: Ghosts,
    pub(super) link_remaps: LinkRemaps,
    /// Files of /proc whose task is gone.
    pub(super) departed: Vec<RemapFilePathEntry>,
    pub(super) pipes: PipeContents,
    pub(super) fifos: PipeContents,
    pub(super) terminals: Terminals,
    pub(super) build_ids: BuildIds,
    pub(super) sockets: DumpedSockets,
    pub(super) locks: Locks,
    pub(super) epolls: Vec<Unresolved>,
    pub(super) maps: MapContents,
    /// Processes and threads of the tree.
    pub(super) inside: HashSet<Pid>,
    /// The process of each thread through which files are looked at.
    pub(super) process_of: HashMap<Pid, Pid>,
    pub(super) finder: Finder,
    pub(super) rings: DumpedRings,
    /// Watched files without a name: the last one, and whose watch it is.
    pub(super) nameless_watches: Vec<(Watched, PathBuf, OpenFile)>,
    /// What is not saved and need not stop a dump.
    pub(super) warnings: Vec<String>,
    next_id: u32,
}

/// What a kind sees and adds to while it dumps a file.
pub(super) struct DumpState<'a> {
    pub(super) shared: &'a mut SharedDump,
    pub(super) collected: &'a mut Collected,
}

/// What was dumped, in numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FileStats {
    /// Open files.
    pub nr_files: u64,
    /// Descriptors of all tables.
    pub nr_descriptors: u64,
    /// Bytes of deleted files that were saved.
    pub ghost_bytes: u64,
    /// Bytes found waiting in pipes and fifos.
    pub pipe_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct LinkKey {
    dev: u64,
    ino: u64,
    path: Vec<u8>,
    flags: u32,
}

/// What /proc/PID/maps shows of a mapped file; equal values are the same file, which saves a look at each
/// of a library's mappings in each of the tasks.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct MappingKey {
    device: (u32, u32),
    inode: u64,
    path: Vec<u8>,
    flags: u32,
}

impl Collected {
    /// The next number of an open file.
    pub(super) fn new_id(&mut self) -> u32 {
        self.next_id += 1;
        self.next_id
    }
}

impl FileTable {
    /// A table of no tasks.
    pub fn new(options: &FileDumpOptions) -> FileTable {
        FileTable {
            collected: Collected {
                options: options.clone(),
                entries: Vec::new(),
                ghosts: Ghosts::default(),
                link_remaps: LinkRemaps::default(),
                departed: Vec::new(),
                pipes: PipeContents::default(),
                fifos: PipeContents::default(),
                terminals: Terminals::default(),
                build_ids: BuildIds::default(),
                sockets: DumpedSockets::default(),
                locks: Locks::default(),
                epolls: Vec::new(),
                maps: MapContents::default(),
                inside: HashSet::new(),
                process_of: HashMap::new(),
                finder: Finder::default(),
                rings: DumpedRings::default(),
                nameless_watches: Vec::new(),
                warnings: Vec::new(),
                next_id: 0,
            },
            sorted_tables: Vec::new(),
            table_of: HashMap::new(),
            tables: Vec::new(),
            descriptions: Descriptions::default(),
            links: HashMap::new(),
            mapped: HashMap::new(),
            mapped_memfds: HashMap::new(),
            obstacles: Vec::new(),
            in_flight: Vec::new(),
            lock_watch: None,
            quick: None,
            spent: Vec::new(),
            recalled: HashMap::new(),
            run_id: network_lock::new_run_id(),
            // Where that is forbidden the old limit may still do.
            limit: rlimit::raise_descriptor_limit(0).ok(),
        }
    }

    /// Looks into the kernel through what others may have opened already.
    pub(crate) fn with_kernel(mut self, kernel: LazyKernel) -> FileTable {
        self.collected.rings.kernel = kernel;
        self
    }

    /// Collects the descriptors of all living tasks of the tree.
    ///
    /// **Preconditions**: the tasks are stopped.
    ///
    /// # Errors
    /// `Obstacles` with everything that can't be dumped.
    pub fn add_tasks(&mut self, tree: &Tree, shared: &mut SharedDump) -> Result<(), FileDumpError> {
        self.quick = Some(QuickLook::begin(self.lock_watch.take().as_ref()));
        let tasks = tree.tasks.iter();
        self.collected.inside = tasks.flat_map(Task::tids).collect();
        for task in tree.alive() {
            let speaker = task.speaker();
            self.collected.process_of.insert(speaker, task.pid);
            self.collected.rings.settle(task.pid, task.tids().count());
            if self.assign_table(speaker)? {
                self.add_table(speaker, shared)?;
            }
            let own = survey::threads_with_own_table(speaker, &task.threads);
            self.obstacles.extend(own);
        }
        let mut inside: Vec<Pid> = tree.tasks.iter().map(|task| task.pid).collect();
        self.add_messages(shared)?;
        let mut half_open = self.collected.pipes.half_open()?;
        half_open.retain(|_, file| !self.collected.options.has_external(file));
        let groups = tree.tasks.iter().map(|task| task.pgid).collect();
        let held = autofs::settle(&mut half_open, &groups, &mut self.collected);
        self.obstacles.extend(held);
        let held = outside::obstacles_beside(&half_open, &inside, &self.in_flight);
        self.warn_of_unseen_ends(&half_open, &held);
        self.obstacles.extend(held);
        // What is in messages, and what we ask sockets through, is ours only for the time of the dump.
        inside.push(Pid::this());
        self.settle_sockets(&inside, tree.journal.as_ref())?;
        if self.obstacles.is_empty() {
            let unpaired = self.collected.terminals.unpaired(&self.collected.options);
            self.obstacles.extend(unpaired);
            self.resolve_epolls()?;
            self.check_nameless_watches();
        }
        if self.obstacles.is_empty() {
            Ok(())
        } else {
            Err(FileDumpError::Obstacles(std::mem::take(
                &mut self.obstacles,
            )))
        }
    }

    /// Says which pipes have another end that nobody was seen to hold.
    fn warn_of_unseen_ends(&mut self, pipes: &HashMap<Vec<u8>, OpenFile>, held: &[Obstacle]) {
        for file in pipes.values() {
            let seen = held
                .iter()
                .any(|held| held.object.contains(&*file.link_text()));
            if !seen {
                self.collected.warnings.push(format!(
                    "task {}: {} ({}): its other end is open where /proc does not show it; after a restore it is closed",
                    file.pid,
                    file.place,
                    file.link_text()
                ));
            }
        }
    }

    /// Reads the messages that wait in sockets, and the files in them, which may be sockets, too.
    fn add_messages(&mut self, shared: &mut SharedDump) -> Result<(), FileDumpError> {
        while let Some((id, messages)) = self.collected.sockets.unix.next_queue() {
            for mut message in messages {
                let mut rights = Vec::new();
                for fd in std::mem::take(&mut message.rights) {
                    rights.extend(self.add_in_flight(fd, shared)?);
                }
                self.collected.sockets.packets.add(id, message, rights);
            }
        }
        Ok(())
    }

    fn settle_sockets(
        &mut self,
        inside: &[Pid],
        journal: Option<&Journal>,
    ) -> Result<(), FileDumpError> {
        let Collected {
            sockets,
            entries,
            options,
            next_id,
            warnings,
            ..
        } = &mut self.collected;
        let mut new_id = || {
            *next_id += 1;
            *next_id
        };
        let settled = sockets
            .unix
            .settle_peers(entries, &options.sockets, inside, &mut new_id);
        entries.extend(settled.stubs);
        warnings.extend(settled.warnings);
        self.obstacles.extend(settled.obstacles);
        let found = sockets
            .tcp
            .lock_and_read(entries, &self.run_id, &options.sockets, journal)?;
        warnings.extend(found.left_out);
        self.obstacles.extend(found.obstacles);
        Ok(())
    }

    /// The name of this dump, by which a restore finds its network lock.
    pub fn run_id(&self) -> &str {
        &self.run_id
    }

    /// How the network is locked, as images have it; None where nothing had to be.
    pub fn lock_method(&self) -> Option<u32> {
        self.collected.sockets.tcp.lock_method()
    }

    /// Lets TCP connections go on, or prepares them to vanish without a word when the tasks are killed.
    pub fn release_connections(&mut self, killed: bool) {
        if killed {
            self.collected.sockets.tcp.give_up();
        } else {
            self.collected.sockets.tcp.go_on();
        }
    }

    /// Watched files without a name are found again as ghosts, so the tree must have them open.
    fn check_nameless_watches(&mut self) {
        for (watched, old, file) in std::mem::take(&mut self.collected.nameless_watches) {
            if !self.collected.ghosts.has(watched.dev, watched.ino) {
                self.obstacles.push(file.obstacle(Trouble::new(
                    format!(
                        "it watches {}, which was removed and which no task of the tree has open",
                        old.display()
                    ),
                    "let the task remove the watch, or dump the tree that contains whoever has it",
                )));
            }
        }
    }

    /// What is not saved, in words.
    pub fn warnings(&self) -> &[String] {
        &self.collected.warnings
    }

    /// The descriptors of a task's table, as far as they are known.
    pub(super) fn table_of_task(&self, pid: Pid) -> Vec<FdinfoEntry> {
        let id = self.table_of.get(&pid);
        let table = self.tables.iter().find(|(other, _)| Some(other) == id);
        table.map(|(_, table)| table.clone()).unwrap_or_default()
    }

    /// Number of the task's descriptor table, for its ids image.
    ///
    /// # Panics
    /// If the task was not added.
    pub fn files_id(&self, pid: Pid) -> u32 {
        *self.table_of.get(&pid).expect("a task that was added")
    }

    /// Finds or makes the number of the task's table; true for a table not seen before.
    fn assign_table(&mut self, pid: Pid) -> Result<bool, FileDumpError> {
        let found = sharing::search(&self.sorted_tables, |&(other, _)| {
            kcmp(other, pid, Resource::Files).map_err(|source| FileDumpError::Compare {
                pid,
                other,
                source,
            })
        })?;
        let id = match found {
            Ok(at) => self.sorted_tables[at].1,
            Err(at) => {
                let nth = u32::try_from(self.sorted_tables.len()).expect("fewer tables than pids");
                self.sorted_tables.insert(at, (pid, FIRST_FILES_ID + nth));
                FIRST_FILES_ID + nth
            }
        };
        self.table_of.insert(pid, id);
        Ok(found.is_err())
    }

    /// Adds a file that a task holds without a descriptor; equal ones share an entry. `flags` are those to
    /// open it with. Returns its number in files.img.
    ///
    /// # Errors
    /// `Obstacles` when it can't be dumped.
    pub fn add_link(&mut self, pid: Pid, link: ProcLink, flags: u32) -> Result<u32, FileDumpError> {
        let file = OpenFile::of_link(pid, link, flags)?;
        let key = LinkKey {
            dev: file.stat.dev,
            ino: file.stat.ino,
            path: file.link.clone(),
            flags,
        };
        if let Some(&id) = self.links.get(&key) {
            return Ok(id);
        }
        let obstacles = survey::link_obstacles(&file, &self.collected.options);
        if !obstacles.is_empty() {
            return Err(FileDumpError::Obstacles(obstacles));
        }
        let id = self.collected.new_id();
        let entry = regular::dump(&file, id, FownEntry::default(), &mut self.collected)?;
        self.collected.entries.push(entry);
        self.links.insert(key, id);
        Ok(id)
    }

    /// Writes all images of open files.
    ///
    /// **Preconditions**: the tasks are still stopped: contents of pipes and deleted files are read now.
    ///
    /// # Errors
    /// As of the images; the content of a deleted file or a pipe could not be read.
    pub fn write(&mut self, images: &ImageSetWriter) -> Result<FileStats, FileDumpError> {
        self.collected.entries.sort_by_key(|entry| entry.id);
        images.write_all(ImageKind::Files, 0, &self.collected.entries)?;
        let mut stats = FileStats {
            nr_files: count(self.collected.entries.len()),
            ..FileStats::default()
        };
        for (files_id, table) in &self.tables {
            images.write_all(ImageKind::Fdinfo, u64::from(*files_id), table)?;
            stats.nr_descriptors += count(table.len());
        }
        let mut remaps = self.collected.ghosts.remaps().to_vec();
        remaps.extend_from_slice(self.collected.link_remaps.remaps());
        remaps.extend_from_slice(&self.collected.departed);
        images.write_all(ImageKind::RemapFpath, 0, &remaps)?;
        stats.ghost_bytes = self.collected.ghosts.write(images)?;
        stats.pipe_bytes = self.collected.pipes.write(images, ImageKind::PipesData)?
            + self.collected.fifos.write(images, ImageKind::FifoData)?;
        self.collected.terminals.write(images)?;
        self.collected.sockets.write(images)?;
        self.collected.locks.write(images)?;
        self.collected.maps.write(images)?;
        Ok(stats)
    }

    /// Ends a dump that succeeded: what was made for it stays, because the images refer to it.
    pub fn keep(mut self) {
        self.collected.link_remaps.keep();
    }
}

impl MappedFiles for FileTable {
    fn mapped_file(
        &mut self,
        pid: Pid,
        mapping: &Mapping,
        open_flags: u32,
    ) -> Result<u32, Box<dyn std::error::Error + Send + Sync>> {
        let key = MappingKey {
            device: mapping.device,
            inode: mapping.inode,
            path: mapping.name.clone(),
            flags: open_flags,
        };
        if let Some(&id) = self.mapped.get(&key) {
            return Ok(id);
        }
        let link = ProcLink::MapFiles {
            start: mapping.range.start,
            end: mapping.range.end,
        };
        let id = self.add_link(pid, link, open_flags)?;
        self.mapped.insert(key, id);
        Ok(id)
    }

    fn mapped_ring(&mut self, pid: Pid, mapping: &Mapping) -> Option<u32> {
        let same = self
            .descriptions
            .by_key
            .iter()
            .filter(|(key, _)| key.may_be(mapping.inode));
        let rings = same.flat_map(|(_, known)| known);
        let mut rings = rings.filter(|known| known.fd_type == FdTypes::FirnUring);
        let ring = rings.next()?.id;
        // Kernels that give all rings one inode don't tell whose part it is.
        let is_clear = rings.all(|other| other.id == ring);
        (is_clear && self.may_map_ring(pid, ring)).then_some(ring)
    }

    fn mapped_socket(
        &mut self,
        mapping: &Mapping,
    ) -> Result<u32, Box<dyn std::error::Error + Send + Sync>> {
        let packet = &self.collected.sockets.packet;
        Ok(packet.mapped(mapping.inode, mapping.range.len())?)
    }

    fn mapped_memfd(&mut self, inode_id: u32, open_flags: u32) -> u32 {
        if let Some(&id) = self.mapped_memfds.get(&(inode_id, open_flags)) {
            return id;
        }
        let id = self.collected.new_id();
        let entry = memfd::entry(id, open_flags, 0, FownEntry::default(), inode_id);
        self.collected.entries.push(entry);
        self.mapped_memfds.insert((inode_id, open_flags), id);
        id
    }
}

/// An error maker for a question about an open file.
pub(super) fn query(file: &OpenFile, what: &'static str, source: firn_sys::Errno) -> FileDumpError {
    FileDumpError::Query {
        pid: file.pid,
        object: format!("{} ({})", file.place, String::from_utf8_lossy(&file.link)),
        what,
        source,
    }
}

/// The descriptor number of a file that is held by one.
pub(super) fn fd_of(file: &OpenFile) -> Option<i32> {
    match file.place {
        Place::Fd(fd) => Some(fd),
        Place::Link(_) => None,
    }
}

fn count(len: usize) -> u64 {
    u64::try_from(len).expect("usize fits 64 bits")
}
