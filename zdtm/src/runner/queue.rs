//! Many cases: picks them, plays some at once, reports.

use std::collections::VecDeque;
use std::fmt;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::huge_pages::HugePages;
use super::isolate;
use super::{Play, end_tree};
use crate::workload::{directory_name, matches};
use crate::{Need, Workload, sys, workloads};

/// What to run and how.
#[derive(Debug, Clone)]
pub struct Options {
    /// Patterns of names; none means all.
    pub patterns: Vec<String>,
    /// How often each workload is started afresh.
    pub iterations: u32,
    /// Cases at once.
    pub parallel: usize,
    /// Whether to go on after a failure.
    pub keep_going: bool,
    /// Whether directories are kept after a pass.
    pub keep: bool,
    /// How each is played.
    pub play: Play,
}

/// How many cases came to what.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Passed.
    pub passed: usize,
    /// Failed.
    pub failed: usize,
    /// Not run, because the machine lacks something.
    pub skipped: usize,
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Totals {
            passed,
            failed,
            skipped,
        } = self;
        write!(f, "{passed} passed, {failed} failed, {skipped} skipped")
    }
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn on_interrupt(_signal: i32) {
    INTERRUPTED.store(true, Ordering::SeqCst);
}

/// Lists the workloads that one of the patterns matches, all when there is no pattern.
pub fn select(patterns: &[String]) -> Vec<&'static Workload> {
    let wanted = |name: &str| patterns.is_empty() || patterns.iter().any(|p| matches(p, name));
    workloads::all()
        .filter(|workload| wanted(workload.name))
        .collect()
}

/// Runs all chosen workloads and returns the counts.
///
/// **Errors** when nothing can be run at all, or on SIGINT and SIGTERM, after everything that had been
/// started is gone.
pub fn run(options: &Options) -> Result<Totals> {
    let chosen = select(&options.patterns);
    ensure!(
        !chosen.is_empty(),
        "no workload matches {:?}; see --list",
        options.patterns
    );
    options.play.find_engine()?;
    for signal in [libc::SIGINT, libc::SIGTERM] {
        sys::handle(signal, on_interrupt, 0).context("catching interruptions")?;
    }
    sys::prctl(libc::PR_SET_CHILD_SUBREAPER, 1).context("becoming a subreaper")?;
    let parallel = if options.play.host {
        1
    } else {
        options.parallel.max(1)
    };
    let _huge_pages = HugePages::reserve(&chosen, parallel)
        .inspect_err(|error| eprintln!("no huge pages: {error}"));
    let scratch = tempfile::Builder::new()
        .prefix("firn-zdtm.")
        .permissions(fs::Permissions::from_mode(0o755))
        .tempdir()?;
    let jobs = chosen
        .iter()
        .flat_map(|workload| (1..=options.iterations).map(move |iteration| (*workload, iteration)));
    let queue = Queue {
        options,
        scratch: scratch.path(),
        jobs: Mutex::new(jobs.collect()),
        totals: Mutex::new(Totals::default()),
        halted: AtomicBool::new(false),
    };
    thread::scope(|scope| {
        for _ in 0..parallel {
            scope.spawn(|| queue.work());
        }
    });
    let totals = *queue
        .totals
        .lock()
        .unwrap_or_else(|poison| poison.into_inner());
    if totals.failed > 0 || options.keep {
        println!("logs are in {}", scratch.keep().display());
    }
    if INTERRUPTED.load(Ordering::SeqCst) {
        println!("{totals}");
        bail!("interrupted");
    }
    Ok(totals)
}

struct Queue<'a> {
    options: &'a Options,
    scratch: &'a Path,
    jobs: Mutex<VecDeque<(&'static Workload, u32)>>,
    totals: Mutex<Totals>,
    halted: AtomicBool,
}

impl Queue<'_> {
    fn work(&self) {
        while !self.halted.load(Ordering::SeqCst) && !INTERRUPTED.load(Ordering::SeqCst) {
            let job = self
                .jobs
                .lock()
                .unwrap_or_else(|poison| poison.into_inner())
                .pop_front();
            let Some((workload, iteration)) = job else {
                return;
            };
            self.take(workload, iteration);
        }
    }

    fn take(&self, workload: &'static Workload, iteration: u32) {
        let name = workload.name;
        let mut label = name.to_owned();
        if self.options.iterations > 1 {
            label.push_str(&format!(" #{iteration}"));
        }
        let needs_root = self.options.play.uid.is_some() && workload.needs.contains(&Need::Root);
        let is_named = self.options.patterns.iter().any(|pattern| pattern == name);
        let unmet = match needs_root {
            true => Some("it needs root".to_owned()),
            false if workload.heavy && !is_named => Some(format!("it is heavy: --test {name}")),
            false => None,
        };
        if let Some(reason) = unmet.or_else(|| workload.unmet_need()) {
            self.report(
                |totals| totals.skipped += 1,
                &format!("SKIP  {label}: {reason}"),
            );
            return;
        }
        let dir = self
            .scratch
            .join(format!("{}.{iteration}", directory_name(name)));
        let start = Instant::now();
        let verdict = fs::create_dir(&dir)
            .map_err(|error| anyhow!("making {}: {error}", dir.display()))
            .and_then(|()| play_apart(workload, &self.options.play, &dir));
        let seconds = start.elapsed().as_secs_f64();
        if INTERRUPTED.load(Ordering::SeqCst) {
            let _ = fs::remove_dir_all(&dir);
            return;
        }
        match verdict {
            Ok(()) => {
                if !self.options.keep {
                    let _ = fs::remove_dir_all(&dir);
                }
                self.report(
                    |totals| totals.passed += 1,
                    &format!("PASS  {label}  {seconds:.2} s"),
                );
            }
            Err(error) => {
                if !self.options.keep_going {
                    self.halted.store(true, Ordering::SeqCst);
                }
                let place = dir.display();
                self.report(
                    |totals| totals.failed += 1,
                    &format!("FAIL  {label}  {seconds:.2} s: {error:#}\n    kept: {place}"),
                );
            }
        }
    }

    fn report(&self, count: impl FnOnce(&mut Totals), line: &str) {
        let mut totals = self
            .totals
            .lock()
            .unwrap_or_else(|poison| poison.into_inner());
        count(&mut totals);
        println!("{}", line.trim_end());
    }
}

/// Plays a case in a process of its own, which is ended with all its tasks when it takes too long.
fn play_apart(workload: &Workload, play: &Play, dir: &Path) -> Result<()> {
    let runner_log = dir.join("runner.log");
    let log = fs::File::create(&runner_log)?;
    let mut command = Command::new(std::env::current_exe().context("finding our own program")?);
    command
        .args(["case", workload.name, "--dir"])
        .arg(dir)
        .args(play.to_arguments());
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    isolate::die_with_parent(&mut command);
    let mut child = command.spawn().context("starting the case")?;
    let pid = i32::try_from(child.id()).context("a pid above 2^31")?;
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().context("waiting for the case")? {
            break status;
        }
        let late = start.elapsed() > play.case_timeout(workload);
        if late || INTERRUPTED.load(Ordering::SeqCst) {
            end_tree(pid);
            let _ = child.wait();
            bail!(if late {
                "the whole case took too long"
            } else {
                "interrupted"
            });
        }
        thread::sleep(Duration::from_millis(5));
    };
    match fs::read_to_string(outcome_file(dir)) {
        Ok(text) if text == "pass" && status.success() => Ok(()),
        Ok(text) => Err(anyhow!("{}", text.trim_end())),
        Err(_) => {
            let said = fs::read_to_string(&runner_log).unwrap_or_default();
            let signal = status.signal();
            bail!(
                "the case ended without outcome ({status}, signal {signal:?}): {}",
                said.trim()
            )
        }
    }
}

/// Where a case leaves what it came to: `pass`, or the reason of the failure.
pub fn outcome_file(dir: &Path) -> PathBuf {
    dir.join("outcome")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_print_in_the_form_that_scripts_look_for() {
        let totals = Totals {
            passed: 3,
            failed: 0,
            skipped: 1,
        };
        assert_eq!(totals.to_string(), "3 passed, 0 failed, 1 skipped");
    }

    #[test]
    fn names_are_unique_and_of_the_form_area_slash_name() {
        let mut names: Vec<&str> = select(&[]).iter().map(|workload| workload.name).collect();
        assert!(names.iter().all(|name| name.split('/').count() == 2));
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]));
    }
}
