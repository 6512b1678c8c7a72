//! A stopped shell with files, and a child that gets them back.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use firn_engine::arch::Abi;
use firn_engine::files::{
    FileDumpError, FileDumpOptions, FileRestoreError, FileRestoreOptions, FileStats, FileStore,
    FileTable, MemfdRestore, MemfdSource,
};
use firn_engine::memory::SharedDump;
use firn_engine::program::{Arena, Program, ProgramSet, Rule, WaitOutcome};
use firn_engine::tree::{Task, TaskState, Tree};
use firn_images::{IMG_VERSION, ImageDir, ImageSetWriter};
use firn_proto::InventoryEntry;
use firn_sys::clone3::{ProgramEntry, spawn_program};
use firn_sys::{Pid, nr, pidfd, task, wait};

const TIMEOUT: Duration = Duration::from_secs(60);

/// Whoever started the tests may have left descriptors open for them.
const CLOSE_INHERITED: &str = "for fd in /proc/$$/fd/*; do fd=${fd##*/}; \
    if [ $fd -gt 2 ]; then eval \"exec $fd>&-\"; fi; done";

/// A shell that has run its script and stopped itself; killed when dropped.
pub struct Shell {
    process: std::process::Child,
}

impl Shell {
    /// Runs the script in `dir` up to its end.
    pub fn start(dir: &Path, script: &str) -> Shell {
        Self::start_with(dir, script, Stdio::null())
    }

    /// The same, with a standard input.
    pub fn start_with(dir: &Path, script: &str, stdin: Stdio) -> Shell {
        let script = format!("{CLOSE_INHERITED}\n{script}\nkill -STOP $$\n");
        let process = Command::new("bash")
            .args(["--norc", "-c", &script])
            .current_dir(dir)
            .stdin(stdin)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("bash");
        let shell = Shell { process };
        let deadline = Instant::now() + TIMEOUT;
        while state(shell.pid()) != Some('T') {
            assert!(Instant::now() < deadline, "the script stops at its end");
            std::thread::sleep(Duration::from_millis(5));
        }
        shell
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.process.id().cast_signed())
    }

    /// The shell alone as a tree.
    pub fn tree(&self) -> Tree {
        tree_of(&[self.pid()])
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn state(pid: Pid) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

/// Tasks as a tree, all of them children of the first.
pub fn tree_of(pids: &[Pid]) -> Tree {
    let task = |&pid: &Pid| Task {
        pid,
        ppid: pids[0],
        pgid: pids[0],
        sid: pids[0],
        state: TaskState::Alive,
        abi: Abi::Native,
        threads: vec![pid],
    };
    Tree::new(pids.iter().map(task).collect())
}

/// What a dump of the open files gave.
pub struct Dumped {
    pub images: ImageDir,
    pub stats: FileStats,
    pub files_ids: Vec<u32>,
}

/// Dumps the open files of the tree into `dir`.
pub fn dump(tree: &Tree, dir: &Path, options: &FileDumpOptions) -> Result<Dumped, FileDumpError> {
    let mut table = FileTable::new(options);
    let mut shared = SharedDump::new().expect("memory files");
    table.add_tasks(tree, &mut shared)?;
    let writer = ImageSetWriter::create(dir).expect("an empty directory");
    let stats = table.write(&writer)?;
    let files_ids = tree
        .tasks
        .iter()
        .map(|task| table.files_id(task.pid))
        .collect();
    let inventory = InventoryEntry {
        img_version: IMG_VERSION,
        ..InventoryEntry::default()
    };
    writer.seal(&inventory).expect("seal");
    table.keep();
    Ok(Dumped {
        images: ImageDir::open(dir).expect("just written"),
        stats,
        files_ids,
    })
}

/// No memory files.
pub struct NoMemfds;

impl MemfdRestore for NoMemfds {
    fn memfd(&self, _: u32) -> Result<MemfdSource<'_>, Box<dyn std::error::Error + Send + Sync>> {
        Err("no memory files in this test".into())
    }
}

/// Reads, checks and opens everything.
pub fn restore(images: &ImageDir) -> Result<FileStore, FileRestoreError> {
    let mut store = FileStore::load(images)?;
    let options = FileRestoreOptions::default();
    store.check(&options, &[])?;
    store.open_all(&options, &NoMemfds)?;
    Ok(store)
}

/// A task that has the files of a table and does nothing.
pub struct Holder {
    pub pid: Pid,
    _arena: Arena,
}

impl Holder {
    /// Forks a child whose program makes the table.
    pub fn start(store: &FileStore, files_id: u32) -> Holder {
        let mut program = Program::new("holder");
        if let Some((address, len, signature)) = task::own_rseq() {
            let args = [address.into(), len.into(), 1u64.into(), signature.into()];
            program.call(nr::RSEQ, &args, Rule::Ok, "leaving the inherited rseq area");
        }
        store.plan_table(files_id, &mut program);
        store.plan_owners(files_id, &mut program);
        program.park();
        let mut set = ProgramSet::new();
        let id = set.add(program);
        let arena = Arena::create(&set, set.place(base())).expect("arena");
        let (record, context) = arena.entry(id);
        let entry = ProgramEntry {
            executor: arena.placed().base(),
            record,
            context,
        };
        // SAFETY: the arena holds the executor and the program, which leaves rseq first.
        let pid = unsafe { spawn_program(0, 17, None, entry) }.expect("clone3");
        let holder = Holder { pid, _arena: arena };
        match holder
            ._arena
            .wait_parked(&set, 1, TIMEOUT, || Ok::<(), ()>(()))
        {
            WaitOutcome::Reached => holder,
            WaitOutcome::Failed(failure) => panic!("{failure}"),
            other => panic!("{other:?}"),
        }
    }

    /// A duplicate of one of its descriptors.
    pub fn file(&self, fd: i32) -> File {
        let pidfd = pidfd::open(self.pid).expect("alive");
        pidfd::getfd(pidfd, fd).expect("an open descriptor").into()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = task::kill(self.pid, 9);
        while matches!(wait::wait(self.pid), Ok(status) if !matches!(status, wait::Status::Ended(_)))
        {
        }
    }
}

/// Tests run in parallel in one address space, so each takes an arena of its own.
fn base() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0x100_0000_0000);
    NEXT.fetch_add(0x1000_0000, Ordering::Relaxed)
}

/// All descriptors as /proc shows them: link, position and flags. Pipes lose their numbers.
pub fn table_of(pid: Pid) -> BTreeMap<i32, String> {
    let numbers = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("alive");
    numbers
        .map(|entry| {
            let name = entry
                .expect("a descriptor")
                .file_name()
                .into_string()
                .expect("digits");
            let link = std::fs::read_link(format!("/proc/{pid}/fd/{name}")).expect("a link");
            let link = link.to_string_lossy().into_owned();
            let link = link.split(":[").next().unwrap_or_default().to_owned();
            let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{name}")).expect("info");
            let lines: Vec<&str> = info.lines().take(2).collect();
            (
                name.parse().expect("a number"),
                format!("{link} {}", lines.join(" ")),
            )
        })
        .collect()
}
