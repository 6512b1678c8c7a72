//! `firn demo`: a little world of its own is frozen, killed and brought back.

mod stage;
mod voice;
pub mod world;

use std::time::Duration;

use clap::Args;
use firn_engine::cancel::CancelFlag;
use firn_engine::check::{Feature, Group, Verdict};
use firn_engine::{Dump, DumpReport, Pid, Restore, RestoreReport};
use firn_sys::signal::TerminationFlag;

use self::stage::{Actor, Stage};
use self::voice::Voice;
use crate::output::{Failure, bytes, counted, duration};

/// Ticks to watch before the dump and after the restore.
const WATCHED: u64 = 25;

/// Options of the demo.
#[derive(Debug, Args)]
pub struct DemoArgs {}

/// Plays it; whatever happens, nothing stays behind.
pub fn run(_args: &DemoArgs) -> Result<u8, Failure> {
    check_machine()?;
    let cancel = CancelFlag::new();
    let _signals = TerminationFlag::install(cancel.as_atomic())
        .map_err(|errno| Failure::io("signals can't be handled", &errno.into()))?;
    let mut stage = Stage::build(cancel.clone())?;
    let story = Story {
        voice: Voice::new(),
        cancel,
    };
    story.play(&mut stage)?;
    Ok(0)
}

/// Says which right or facility is missing before anything is started.
fn check_machine() -> Result<(), Failure> {
    for feature in Feature::ALL
        .iter()
        .filter(|feature| feature.group() == Group::Core)
    {
        if let Verdict::Missing { why, cost } = feature.probe() {
            let text = format!(
                "the demo can't run here: {why} ({}: {cost})",
                feature.name()
            );
            return Err(Failure::new("refused", text).hint(how_to_get(*feature)));
        }
    }
    Ok(())
}

fn how_to_get(feature: Feature) -> &'static str {
    match feature {
        Feature::Rights => {
            "run it as root, 'sudo firn demo'; in a container, add the capabilities \
             CHECKPOINT_RESTORE, SYS_PTRACE and SYS_ADMIN"
        }
        _ => "'firn check --all' shows everything that this kernel and these rights can do",
    }
}

struct Story {
    voice: Voice,
    cancel: CancelFlag,
}

impl Story {
    fn play(&self, stage: &mut Stage) -> Result<(), Failure> {
        let voice = &self.voice;
        voice.title("Freeze, kill and bring back a running program");
        let root = stage.start()?;
        let before = stage.until(WATCHED)?;
        let cast = stage.actors(root);
        voice.step(&format!("A little world runs in {}", stage.dir().display()));
        voice.cast(&cast);
        voice.progress(
            "it counts in threads, writes a file and pipes to a child",
            &before,
        );

        voice.command(&format!(
            "firn dump -t {root} -D {}",
            stage.images().display()
        ));
        let dumped = self.dump(stage, root)?;
        voice.say(&format!(
            "dumped {}, {}, frozen for {}, then killed",
            counted(dumped.tasks, "task"),
            bytes(dumped.bytes),
            duration(dumped.frozen)
        ));
        self.watch_nothing(stage, &cast)?;

        voice.command(&format!("firn restore -D {}", stage.images().display()));
        let stood = stage.state();
        let restored = self.restore(stage)?;
        voice.say(&format!(
            "restored {} in {}",
            counted(restored.tasks, "task"),
            duration(restored.total)
        ));
        let after = stage.until(stood.ticks + WATCHED)?;
        let again = stage.actors(root);
        voice.cast(&again);
        voice.progress("it goes on where it stood", &after);
        self.verdict(stage, &cast, &again, &dumped)
    }

    fn dump(&self, stage: &Stage, root: Pid) -> Result<DumpReport, Failure> {
        let dump = Dump::new(root)
            .images_dir(stage.images())
            .cancel(self.cancel.clone());
        dump.run().map_err(|error| crate::dump::failure(&error))
    }

    /// Shows that the tasks are gone and that nothing moves.
    fn watch_nothing(&self, stage: &Stage, cast: &[Actor]) -> Result<(), Failure> {
        if !stage.all_gone() {
            return Err(Failure::new("bug", "a dumped task is still there"));
        }
        let pids: Vec<String> = cast.iter().map(|actor| actor.pid.to_string()).collect();
        self.voice
            .say(&format!("processes {} no longer exist", pids.join(", ")));
        let stood = stage.state();
        std::thread::sleep(Duration::from_millis(300));
        stage.check_cancelled()?;
        if stage.state() != stood {
            return Err(Failure::new(
                "bug",
                "the world goes on though its tasks are gone",
            ));
        }
        self.voice.progress("the world stands still", &stood);
        Ok(())
    }

    fn restore(&self, stage: &Stage) -> Result<RestoreReport, Failure> {
        let restore = Restore::new(stage.images()).cancel(self.cancel.clone());
        restore.run().map_err(|error| Failure::of(&error))
    }

    fn verdict(
        &self,
        stage: &Stage,
        before: &[Actor],
        after: &[Actor],
        dumped: &DumpReport,
    ) -> Result<(), Failure> {
        let checks = [
            (
                before == after,
                "same pids, command lines and numbers of threads",
            ),
            (
                stage.is_gapless(),
                "every number is in the file and came through the pipe, once",
            ),
        ];
        self.voice.blank();
        for (holds, what) in checks {
            self.voice.check(holds, what);
        }
        if let Some((_, what)) = checks.iter().find(|(holds, _)| !holds) {
            return Err(Failure::new(
                "bug",
                format!("after the restore it does not hold: {what}"),
            ));
        }
        let frozen = duration(dumped.frozen);
        self.voice
            .say(&format!("It was frozen for {frozen} and noticed nothing."));
        Ok(())
    }
}
