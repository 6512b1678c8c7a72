//! Trees whose tasks do at random what makes relations: children, sessions, groups, subreapers, deaths.
//!
//! The number that a family grows from decides all of it, so a failure comes again. `FIRN_ZDTM_SEED` names another first
//! number, to look further than the usual run does.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result, ensure};

use crate::random::Random;
use crate::sys::{self, Region};
use crate::{Stage, Workload};

pub static TREE: Workload = Workload::new(
    "tree/random",
    "four families grown at random: who makes whom, sessions, groups, subreapers, deaths, shared pages",
    tree,
);

const FAMILIES: u64 = 4;
const GENERATIONS: u32 = 4;
const STEPS: u64 = 7;
const PAGES: usize = 16;
const PAGE: usize = 4096;

/// What a child has from its parent.
#[derive(Clone)]
struct Member {
    generation: u32,
    /// Groups that its session had at some time.
    groups: Vec<i32>,
    memory: Region,
    /// What its pages are filled from; 0 where they are untouched.
    seeds: [u64; PAGES],
}

impl Member {
    fn write(&mut self, random: &mut Random) {
        let nth = random.index(PAGES);
        self.seeds[nth] = random.next() | 1;
        self.memory.part(nth * PAGE, PAGE).fill(self.seeds[nth]);
    }

    fn verify(&self) -> Result<()> {
        for (page, seed) in self.memory.pages().zip(self.seeds) {
            match seed {
                0 => page.check_zero()?,
                seed => page.check(seed)?,
            }
        }
        Ok(())
    }

    /// One step of a life. What the kernel forbids at this moment is left out.
    fn step(&mut self, stage: &Stage, random: &mut Random) -> Result<()> {
        match random.below(10) {
            0 => {
                let _ = sys::setsid().map(|session| self.groups = vec![session]);
            }
            1 => {
                let _ = sys::setpgid(0, 0).map(|()| self.groups.push(sys::pid()));
            }
            2 => {
                let group = self.groups[random.index(self.groups.len())];
                let _ = sys::setpgid(0, group);
            }
            3 => {
                sys::prctl(libc::PR_SET_CHILD_SUBREAPER, random.below(2))?;
            }
            4..=6 => self.write(random),
            _ if self.generation < GENERATIONS => self.bear(stage, random)?,
            _ => {}
        }
        Ok(())
    }

    fn bear(&self, stage: &Stage, random: &mut Random) -> Result<()> {
        let child = Member {
            generation: self.generation + 1,
            ..self.clone()
        };
        let (seed, dies) = (Random::new(random.next()), random.below(3) == 0);
        let born = stage.child(|stage| child.live(stage, seed, dies))?;
        if !dies {
            return Ok(());
        }
        if random.below(2) == 0 {
            return born.reap();
        }
        Ok(sys::wait_leaving_zombie(born.pid)?)
    }

    fn live(mut self, stage: &Stage, mut random: Random, dies: bool) -> Result<()> {
        for _ in 0..STEPS {
            self.step(stage, &mut random)?;
        }
        stage.ready()?;
        if dies {
            return Ok(());
        }
        stage.wait();
        self.verify()?;
        fs::write(stage.path(&format!("well.{}", sys::pid())), "")?;
        Ok(())
    }
}

/// Parent, group, session of a task, and whether it is a zombie.
type Place = (i32, i32, i32, bool);

/// All tasks below this one.
fn descendants() -> Result<BTreeMap<i32, Place>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        // It may be gone by now.
        if let Ok(stat) = crate::proc::stat(pid) {
            let place = (
                stat[4].parse()?,
                stat[5].parse()?,
                stat[6].parse()?,
                stat[3] == "Z",
            );
            all.insert(pid, place);
        }
    }
    let me = sys::pid();
    let parent = |pid: &i32| all.get(pid).map(|place: &Place| place.0);
    let is_below = |pid: i32| std::iter::successors(parent(&pid), parent).any(|above| above == me);
    let below: Vec<i32> = all.keys().copied().filter(|pid| is_below(*pid)).collect();
    Ok(below.into_iter().map(|pid| (pid, all[&pid])).collect())
}

fn tree(stage: &Stage) -> Result<()> {
    let (first, _) = Random::chosen()?;
    sys::prctl(libc::PR_SET_CHILD_SUBREAPER, 1)?;
    let ancestor = Member {
        generation: 0,
        groups: vec![sys::group_and_session().0],
        memory: Region::anon(PAGES * PAGE)?,
        seeds: [0; PAGES],
    };
    for seed in first..first + FAMILIES {
        let mut random = Random::new(seed);
        ancestor
            .bear(stage, &mut random)
            .with_context(|| format!("family {seed}"))?;
    }
    let before = descendants()?;
    eprintln!("families from {first} on: {before:?}");
    stage.ready_and_wait()?;
    let now = descendants()?;
    ensure!(
        now == before,
        "(parent, group, session, zombie) were {before:?}, are {now:?}"
    );
    let living = before.iter().filter(|(_, place)| !place.3);
    let living: Vec<i32> = living.map(|(pid, _)| *pid).collect();
    for pid in &living {
        sys::kill(*pid, libc::SIGTERM)?;
    }
    while descendants()?.values().any(|place| !place.3) {
        sys::pause_for(2);
    }
    for pid in living {
        let failure = stage.dir().join(format!("failure.{pid}"));
        if let Ok(reason) = fs::read_to_string(failure) {
            anyhow::bail!("task {pid}: {reason}");
        }
        ensure!(
            stage.path(&format!("well.{pid}")).exists(),
            "task {pid} did not come to its end"
        );
    }
    Ok(())
}
