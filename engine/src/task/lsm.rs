//! Labels of security modules: SELinux contexts and AppArmor profiles of threads, and those that they have chosen
//! for what is yet to come: the next program, new sockets, files and keys.
//!
//! A label is a file of each thread, which everybody may read and only the thread itself may write. SELinux
//! lets a process with several threads hardly change its context, so the leader takes its own before the others
//! are made; a thread with another one takes that at its end. A task confined by its label may not be allowed
//! what is left of its restore: that is refused by the kernel and said with the call that failed.
//!
//! A label that can't be had is never dropped: a task that was confined would run free. Profiles in AppArmor
//! namespaces and the labels of other modules are refused by the dump. Landlock domains show nowhere, so that a
//! task in one is restored without.
//!
//! Source: man 7 apparmor; linux security/selinux/hooks.c, selinux_lsm_setattr; security/apparmor/lsm.c,
//! apparmor_setprocattr; fs/proc/base.c, attr_dir_stuff.

use std::sync::OnceLock;

use firn_proto::{CredsEntry, FirnLabelEntry, Lsmtype, ThreadCoreEntry};
use firn_sys::{Pid, nr, procfs};

use crate::obstacle::Obstacle;
use crate::program::{Program, Rule};

const O_WRONLY: u32 = 1;
const AT_FDCWD: i32 = -100;
/// `Y` wherever AppArmor is on.
const APPARMOR: &str = "/sys/module/apparmor/parameters/enabled";
/// What AppArmor says of a task without a profile.
const UNCONFINED: &str = "unconfined";
/// Attributes that name labels of what is to come, beside that of sockets, for which images have a field.
const SELINUX_COMING: &[&str] = &["exec", "fscreate", "keycreate"];
const APPARMOR_COMING: &[&str] = &["exec"];
/// Parts of an SELinux context: user, role, type, level.
const MIN_COLONS: usize = 3;

/// The security module of a machine whose labels are saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Module {
    /// SELinux.
    Selinux,
    /// AppArmor.
    AppArmor,
}

impl Module {
    /// The module that labels tasks here; None without one, and for modules that are not known. It is looked for
    /// once.
    pub fn of_host() -> Option<Module> {
        static OF_HOST: OnceLock<Option<Module>> = OnceLock::new();
        *OF_HOST.get_or_init(|| {
            let own = Labels::file("self", "current").unwrap_or_default();
            let apparmor = procfs::read_to_string(APPARMOR).unwrap_or_default();
            Module::judge(&own, apparmor.starts_with('Y'))
        })
    }

    fn judge(own_label: &str, has_apparmor: bool) -> Option<Module> {
        if has_apparmor {
            return Some(Module::AppArmor);
        }
        is_context(own_label).then_some(Module::Selinux)
    }

    /// The number that images have.
    pub fn to_image(module: Option<Module>) -> i32 {
        match module {
            None => Lsmtype::NoLsm.into(),
            Some(Module::Selinux) => Lsmtype::Selinux.into(),
            Some(Module::AppArmor) => Lsmtype::Apparmor.into(),
        }
    }

    /// The module of an image.
    pub fn from_image(lsmtype: Option<i32>) -> Option<Module> {
        match lsmtype.and_then(|number| Lsmtype::try_from(number).ok())? {
            Lsmtype::NoLsm => None,
            Lsmtype::Selinux => Some(Module::Selinux),
            Lsmtype::Apparmor => Some(Module::AppArmor),
        }
    }

    fn coming(self) -> &'static [&'static str] {
        match self {
            Module::Selinux => SELINUX_COMING,
            Module::AppArmor => APPARMOR_COMING,
        }
    }

    /// The name that users know.
    pub fn name(self) -> &'static str {
        match self {
            Module::Selinux => "SELinux",
            Module::AppArmor => "AppArmor",
        }
    }
}

fn is_context(label: &str) -> bool {
    label.matches(':').count() >= MIN_COLONS
}

/// Labels of a thread.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Labels {
    /// Its own; None where it is not confined.
    pub own: Option<String>,
    /// That of its sockets, where it has chosen one.
    pub sockets: Option<String>,
    /// Attributes and labels of what else is to come.
    pub coming: Vec<(&'static str, String)>,
}

impl Labels {
    /// Reads those of a thread.
    pub fn read(pid: Pid, tid: Pid, module: Option<Module>) -> Labels {
        let Some(module) = module else {
            return Labels::default();
        };
        let task = format!("{pid}/task/{tid}");
        let profile_in = |name: &str| {
            let label = Labels::file(&task, &format!("apparmor/{name}"));
            label
                .or_else(|| Labels::file(&task, name))
                .and_then(|label| profile(&label))
        };
        let label = |name: &str| match module {
            Module::AppArmor => profile_in(name),
            Module::Selinux => Labels::file(&task, name),
        };
        let sockets = Some("sockcreate").filter(|_| module == Module::Selinux);
        let coming = module.coming().iter();
        Labels {
            own: label("current"),
            sockets: sockets.and_then(label),
            coming: coming
                .filter_map(|&name| Some((name, label(name)?)))
                .collect(),
        }
    }

    /// The text of an attribute file; None without a module that has it, or for an empty one.
    fn file(task: &str, name: &str) -> Option<String> {
        let text = procfs::read_to_string(format!("/proc/{task}/attr/{name}")).ok()?;
        let label = text.trim_end_matches(['\0', '\n']);
        (!label.is_empty()).then(|| label.to_owned())
    }

    /// Enters them into an image.
    pub fn describe(&self, thread: &mut ThreadCoreEntry) {
        let bytes = |label: &Option<String>| label.clone().map(String::into_bytes);
        if let Some(creds) = &mut thread.creds {
            creds.lsm_profile = bytes(&self.own);
            creds.lsm_sockcreate = bytes(&self.sockets);
        }
        let entry = |(attribute, label): &(&str, String)| FirnLabelEntry {
            attribute: (*attribute).to_owned(),
            label: label.clone().into_bytes(),
        };
        if !self.coming.is_empty() {
            let extension = thread.firn.get_or_insert_default();
            extension.labels = self.coming.iter().map(entry).collect();
        }
    }

    /// Those that an image has.
    fn of_image(thread: &ThreadCoreEntry) -> Labels {
        let text = |label: &Option<Vec<u8>>| {
            let label = label.as_ref().filter(|label| !label.is_empty());
            label.map(|label| String::from_utf8_lossy(label).into_owned())
        };
        let none = CredsEntry::default();
        let creds = thread.creds.as_ref().unwrap_or(&none);
        // An image names no file that is not known.
        let known = |name: &str| SELINUX_COMING.iter().find(|known| **known == name).copied();
        let entries = thread.firn.iter().flat_map(|firn| &firn.labels);
        let coming = entries.filter_map(|entry| {
            let label = String::from_utf8_lossy(&entry.label).into_owned();
            Some((known(&entry.attribute)?, label))
        });
        Labels {
            own: text(&creds.lsm_profile),
            sockets: text(&creds.lsm_sockcreate),
            coming: coming.collect(),
        }
    }

    /// One of them, to name it in an error.
    fn any(&self) -> Option<&String> {
        let coming = self.coming.iter().map(|(_, label)| label);
        self.own.iter().chain(&self.sockets).chain(coming).next()
    }
}

/// The profile in what AppArmor shows, such as `lxc-default (enforce)`.
fn profile(shown: &str) -> Option<String> {
    let name = shown.split_once(" (").map_or(shown, |(name, _)| name);
    (name != UNCONFINED).then(|| name.to_owned())
}

/// What keeps the labels of a running task from being saved.
pub fn survey(pid: Pid, module: Option<Module>) -> Option<Obstacle> {
    let shown = Labels::file(&pid.to_string(), "current");
    let (object, reason) = trouble(shown.as_deref()?, module)?;
    Some(Obstacle {
        pid,
        object,
        reason: reason.to_owned(),
        hint: Some("run the task without it, or dump it before it is confined".to_owned()),
    })
}

fn trouble(shown: &str, module: Option<Module>) -> Option<(String, &'static str)> {
    match module {
        Some(Module::Selinux) => None,
        Some(Module::AppArmor) => {
            let name = profile(shown)?;
            let has_namespace = name.starts_with(':') || name.contains("//&:");
            has_namespace.then(|| {
                let reason = "it lives in a policy namespace, which is not supported";
                (format!("AppArmor profile {name}"), reason)
            })
        }
        None => {
            let reason = "the labels of that security module are not supported";
            Some((format!("security label {shown}"), reason))
        }
    }
}

/// Whose labels restored tasks get (`--lsm-profile`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum LabelChoice {
    /// Those they had.
    #[default]
    AsDumped,
    /// This one for every task that had one.
    Given(Module, String),
}

/// A `--lsm-profile` that can't be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("can't understand the security label {0}: it is apparmor:PROFILE, selinux:CONTEXT or none")]
pub struct LabelChoiceError(String);

impl std::str::FromStr for LabelChoice {
    type Err = LabelChoiceError;

    /// Parses `apparmor:PROFILE`, `selinux:CONTEXT`, or `none`, which leaves labels as they were dumped.
    fn from_str(text: &str) -> Result<LabelChoice, LabelChoiceError> {
        let bad = || LabelChoiceError(text.to_owned());
        let (kind, label) = text.split_once(':').unwrap_or((text, ""));
        let module = match kind {
            "none" => return Ok(LabelChoice::AsDumped),
            "apparmor" => Module::AppArmor,
            "selinux" => Module::Selinux,
            _ => return Err(bad()),
        };
        match label {
            "" => Err(bad()),
            label => Ok(LabelChoice::Given(module, label.to_owned())),
        }
    }
}

/// A label that can't be restored here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// Another module, or none, labels tasks here.
    #[error("task {pid} was confined by {dumped} as {label}, and this machine has {here}")]
    Module {
        /// The thread.
        pid: Pid,
        /// Module of the dump.
        dumped: &'static str,
        /// The label.
        label: String,
        /// Module of this machine.
        here: &'static str,
    },
    /// A label was given for a module that does not label tasks here.
    #[error("a label of {0} was given, which is not in use on this machine")]
    Given(&'static str),
}

/// How labels come back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabelPlan {
    here: Option<Module>,
    dumped: Option<Module>,
    choice: LabelChoice,
    own: Labels,
}

impl LabelPlan {
    /// Looks at this machine and at what was asked for.
    ///
    /// # Errors
    /// A label is given for a module that is not in use here.
    pub fn new(lsmtype: Option<i32>, choice: &LabelChoice) -> Result<LabelPlan, LabelError> {
        let here = Module::of_host();
        match choice {
            LabelChoice::Given(module, _) if Some(*module) != here => {
                return Err(LabelError::Given(module.name()));
            }
            _ => {}
        }
        Ok(LabelPlan {
            here,
            dumped: Module::from_image(lsmtype),
            choice: choice.clone(),
            own: Labels::read(Pid::this(), Pid::this(), here),
        })
    }

    /// The labels that a thread of an image is to have.
    ///
    /// # Errors
    /// It had a label of a module that is not in use here.
    pub fn wanted(&self, tid: Pid, thread: &ThreadCoreEntry) -> Result<Labels, LabelError> {
        let dumped = Labels::of_image(thread);
        let (Some(label), Some(module)) = (dumped.any(), self.dumped) else {
            return Ok(Labels::default());
        };
        match &self.choice {
            // Labels of what is to come mean something to their own module only.
            LabelChoice::Given(given, name) => Ok(Labels {
                own: dumped.own.as_ref().map(|_| name.clone()),
                ..if *given == module {
                    dumped
                } else {
                    Labels::default()
                }
            }),
            LabelChoice::AsDumped if self.here == Some(module) => Ok(dumped),
            LabelChoice::AsDumped => Err(LabelError::Module {
                pid: tid,
                dumped: module.name(),
                label: label.clone(),
                here: self.here.map_or("no security module", Module::name),
            }),
        }
    }

    /// Adds the calls that name the labels of what is to come.
    pub fn plan_coming(&self, p: &mut Program, wanted: &Labels) {
        for (name, label) in &wanted.coming {
            match self.here {
                Some(Module::AppArmor) => {
                    write(p, &format!("apparmor/{name}"), &format!("{name} {label}"));
                }
                _ => write(p, name, label),
            }
        }
        if let Some(label) = &wanted.sockets {
            write(p, "sockcreate", label);
        }
    }

    /// Adds the calls that give the calling thread its own label, where it has another by now: that of
    /// `inherited`, or of the restorer.
    pub fn plan_own(&self, p: &mut Program, wanted: &Labels, inherited: Option<&Labels>) {
        let present = inherited.unwrap_or(&self.own);
        if let Some(label) = wanted.own.as_ref().filter(|_| wanted.own != present.own) {
            let (file, text) = match self.here {
                Some(Module::AppArmor) => ("apparmor/current", format!("changeprofile {label}")),
                _ => ("current", label.clone()),
            };
            write(p, file, &text);
        }
    }
}

fn write(p: &mut Program, file: &str, text: &str) {
    let path = p.string(format!("/proc/thread-self/attr/{file}").as_bytes());
    let args = [AT_FDCWD.into(), path.into(), O_WRONLY.into(), 0.into()];
    let why = format!("opening the security attribute {file}");
    let fd = p.call_to_slot(nr::OPENAT, &args, Rule::Ok, why);
    let data = p.data(text.as_bytes());
    let len = u64::try_from(text.len()).expect("a label is short");
    let why = format!("taking the security label {text}");
    p.call(
        nr::WRITE,
        &[fd.into(), data.into(), len.into()],
        Rule::Ok,
        why,
    );
    p.call(nr::CLOSE, &[fd.into()], Rule::Ok, "closing it");
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTEXT: &str = "system_u:system_r:container_t:s0:c1,c2";

    fn plan(here: Option<Module>, dumped: Option<Module>, choice: LabelChoice) -> LabelPlan {
        LabelPlan {
            here,
            dumped,
            choice,
            own: Labels::default(),
        }
    }

    fn labels(own: &str) -> Labels {
        Labels {
            own: Some(own.to_owned()),
            ..Labels::default()
        }
    }

    fn thread(labels: &Labels) -> ThreadCoreEntry {
        let mut thread = ThreadCoreEntry {
            creds: Some(CredsEntry::default()),
            ..ThreadCoreEntry::default()
        };
        labels.describe(&mut thread);
        thread
    }

    #[test]
    fn the_module_shows_by_its_labels() {
        assert_eq!(Module::judge(CONTEXT, false), Some(Module::Selinux));
        assert_eq!(Module::judge("unconfined", true), Some(Module::AppArmor));
        assert_eq!(Module::judge("_", false), None);
        assert_eq!(Module::judge("", false), None);
        for module in [None, Some(Module::Selinux), Some(Module::AppArmor)] {
            assert_eq!(Module::from_image(Some(Module::to_image(module))), module);
        }
    }

    #[test]
    fn profiles_lose_their_mode_and_the_unconfined_have_none() {
        assert_eq!(
            profile("lxc-default (enforce)").as_deref(),
            Some("lxc-default")
        );
        assert_eq!(profile("plain").as_deref(), Some("plain"));
        assert_eq!(profile("unconfined"), None);
    }

    #[test]
    fn labels_that_would_be_lost_are_refused() {
        assert_eq!(trouble(CONTEXT, Some(Module::Selinux)), None);
        assert_eq!(trouble("lxc (enforce)", Some(Module::AppArmor)), None);
        assert!(trouble("lxc//&:ns:inner (enforce)", Some(Module::AppArmor)).is_some());
        assert!(trouble(":ns:inner (enforce)", Some(Module::AppArmor)).is_some());
        assert!(trouble("_", None).is_some_and(|(object, _)| object.ends_with('_')));
    }

    #[test]
    fn a_confined_task_is_not_restored_without_its_module() {
        let tid = Pid::from_raw(7);
        let lost = plan(None, Some(Module::Selinux), LabelChoice::AsDumped);
        let error = lost.wanted(tid, &thread(&labels(CONTEXT))).unwrap_err();
        assert!(error.to_string().contains("no security module"), "{error}");
        assert_eq!(
            lost.wanted(tid, &ThreadCoreEntry::default()),
            Ok(Labels::default())
        );
        let other = plan(
            Some(Module::AppArmor),
            Some(Module::Selinux),
            LabelChoice::Given(Module::AppArmor, "box".to_owned()),
        );
        let wanted = other.wanted(tid, &thread(&labels(CONTEXT))).unwrap();
        assert_eq!(wanted.own.as_deref(), Some("box"));
    }

    #[test]
    fn choices_are_understood_as_criu_does() {
        let parse = |text: &str| text.parse::<LabelChoice>();
        let context = LabelChoice::Given(Module::Selinux, CONTEXT.to_owned());
        assert_eq!(parse(&format!("selinux:{CONTEXT}")), Ok(context));
        assert_eq!(parse("none"), Ok(LabelChoice::AsDumped));
        assert!(parse("box").is_err() && parse("smack:x").is_err() && parse("apparmor:").is_err());
    }

    #[test]
    fn only_labels_that_differ_are_written() {
        let labels = labels("box");
        let here = Some(Module::AppArmor);
        let plan = plan(here, here, LabelChoice::AsDumped);
        let mut p = Program::new("test");
        plan.plan_own(&mut p, &labels, None);
        assert_eq!(p.len(), 3);
        assert!(p.describe(1).starts_with("write("), "{}", p.describe(1));
        plan.plan_own(&mut p, &labels, Some(&labels));
        plan.plan_coming(&mut p, &labels);
        assert_eq!(p.len(), 3);
    }

    #[test]
    fn labels_of_what_is_to_come_go_through_images() {
        let here = Some(Module::Selinux);
        let plan = plan(here, here, LabelChoice::AsDumped);
        let labels = Labels {
            sockets: Some(CONTEXT.to_owned()),
            coming: vec![("exec", CONTEXT.to_owned()), ("keycreate", "a".to_owned())],
            ..labels(CONTEXT)
        };
        let mut thread = thread(&labels);
        let tid = Pid::from_raw(7);
        assert_eq!(plan.wanted(tid, &thread), Ok(labels.clone()));
        let mut p = Program::new("test");
        plan.plan_coming(&mut p, &labels);
        assert_eq!(p.len(), 9);
        let firn = thread.firn.as_mut().expect("labels");
        firn.labels[0].attribute = "../mem".to_owned();
        let wanted = plan.wanted(tid, &thread).unwrap();
        assert_eq!(wanted.coming, labels.coming[1..]);
    }

    #[test]
    fn this_machine_is_understood() {
        let module = Module::of_host();
        let plan = LabelPlan::new(Some(Module::to_image(module)), &LabelChoice::AsDumped).unwrap();
        let wanted = plan.wanted(Pid::this(), &ThreadCoreEntry::default());
        assert_eq!(wanted, Ok(Labels::default()));
        assert!(
            LabelPlan::new(None, &LabelChoice::Given(Module::AppArmor, "x".to_owned())).is_ok()
                == (module == Some(Module::AppArmor))
        );
    }
}
