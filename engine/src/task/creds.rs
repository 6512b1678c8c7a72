//! Credentials of a thread: ids, groups, capabilities, secure bits, no_new_privs.
//!
//! Read from /proc, set by the thread itself near the end of its program: making threads with wanted
//! tids, PR_SET_MM and the like need the rights that go away here. Records are added only for what
//! differs from the restoring process, whose credentials every restored task inherits.
//!
//! Keyrings are left alone: session and process keyrings belong to the kernel's key service, not to the
//! task, and a restored task has those of the restoring process.
//!
//! Source: man 7 credentials, capabilities; man 2 capset.

use firn_proto::CredsEntry;
use firn_sys::nr;

use super::status::Status;
use crate::program::{Arg, Program, Rule};

const PR_SET_SECUREBITS: u32 = 28;
const PR_CAPBSET_DROP: u32 = 24;
const PR_SET_NO_NEW_PRIVS: u32 = 38;
const PR_CAP_AMBIENT: u32 = 47;
const PR_CAP_AMBIENT_RAISE: u32 = 2;
const PR_CAP_AMBIENT_LOWER: u32 = 3;
/// Keep capabilities unchanged while uids change.
const SECBIT_NO_SETUID_FIXUP: u32 = 4;
const CAP_SETPCAP: u32 = 8;
/// Names of capabilities by their numbers, without CAP_.
///
/// Source: linux include/uapi/linux/capability.h.
#[rustfmt::skip]
const NAMES: [&str; 41] = [
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE",
];
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

/// The image's form of a thread's credentials.
pub fn to_image(status: &Status, securebits: u32) -> CredsEntry {
    let [inh, prm, eff, bnd, amb] = status.caps.map(halves);
    let [uid, euid, suid, fsuid] = status.uid;
    let [gid, egid, sgid, fsgid] = status.gid;
    CredsEntry {
        uid,
        gid,
        euid,
        egid,
        suid,
        sgid,
        fsuid,
        fsgid,
        cap_inh: inh.to_vec(),
        cap_prm: prm.to_vec(),
        cap_eff: eff.to_vec(),
        cap_bnd: bnd.to_vec(),
        secbits: securebits,
        groups: status.groups.clone(),
        lsm_profile: None,
        lsm_sockcreate: None,
        apparmor_data: None,
        no_new_privs: Some(u32::from(status.no_new_privs)),
        cap_amb: amb.to_vec(),
    }
}

fn halves(set: u64) -> [u32; 2] {
    let bytes = set.to_le_bytes();
    let half = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    [half(0), half(4)]
}

fn joined(words: &[u32]) -> u64 {
    let word = |nth: usize| u64::from(words.get(nth).copied().unwrap_or(0));
    word(0) | word(1) << 32
}

/// Adds the calls that give the thread its credentials, given those of the restoring process.
///
/// ```text
/// keep capabilities while ids change
/// groups, gids, uids
/// inheritable set, all others as they are   before the bounding set limits it
/// ambient set                               needs permitted and inheritable, and no secure bit
/// bounding set, secure bits                 need CAP_SETPCAP
/// effective, permitted, inheritable         last, this takes the rights away
/// ```
pub fn plan(program: &mut Program, wanted: &CredsEntry, own: &CredsEntry) {
    if same(wanted, own) {
        plan_no_new_privs(program, wanted, own);
        return;
    }
    let keep = [
        PR_SET_SECUREBITS.into(),
        (own.secbits | SECBIT_NO_SETUID_FIXUP).into(),
    ];
    program.call(
        nr::PRCTL,
        &keep,
        Rule::Ok,
        "keeping capabilities across the change of ids",
    );
    plan_ids(program, wanted);
    plan_capabilities(program, [&own.cap_eff, &own.cap_prm, &wanted.cap_inh]);
    plan_ambient_set(program, wanted, own);
    plan_bounding_set(program, wanted, own);
    let bits = [PR_SET_SECUREBITS.into(), wanted.secbits.into()];
    program.call(nr::PRCTL, &bits, Rule::Ok, "setting secure bits");
    plan_capabilities(program, [&wanted.cap_eff, &wanted.cap_prm, &wanted.cap_inh]);
    plan_no_new_privs(program, wanted, own);
}

fn plan_ids(program: &mut Program, wanted: &CredsEntry) {
    let groups: Vec<u8> = wanted
        .groups
        .iter()
        .flat_map(|group| group.to_le_bytes())
        .collect();
    let list = program.data(&groups);
    let nr_groups = u64::try_from(wanted.groups.len()).expect("at most 65,536 groups");
    program.call(
        nr::SETGROUPS,
        &[nr_groups.into(), list.into()],
        Rule::Ok,
        "setting supplementary groups",
    );
    let ids = |real: u32, effective: u32, saved: u32| -> [Arg; 3] {
        [real.into(), effective.into(), saved.into()]
    };
    let gids = ids(wanted.gid, wanted.egid, wanted.sgid);
    program.call(nr::SETRESGID, &gids, Rule::Ok, "setting group ids");
    program.call(
        nr::SETFSGID,
        &[wanted.fsgid.into()],
        Rule::Any,
        "setting the fs group id",
    );
    let uids = ids(wanted.uid, wanted.euid, wanted.suid);
    program.call(nr::SETRESUID, &uids, Rule::Ok, "setting user ids");
    program.call(
        nr::SETFSUID,
        &[wanted.fsuid.into()],
        Rule::Any,
        "setting the fs user id",
    );
}

/// True when nothing but no_new_privs differs.
fn same(wanted: &CredsEntry, own: &CredsEntry) -> bool {
    let bare = |creds: &CredsEntry| CredsEntry {
        no_new_privs: None,
        lsm_profile: None,
        lsm_sockcreate: None,
        apparmor_data: None,
        ..creds.clone()
    };
    bare(wanted) == bare(own)
}

fn plan_bounding_set(program: &mut Program, wanted: &CredsEntry, own: &CredsEntry) {
    let dropped = joined(&own.cap_bnd) & !joined(&wanted.cap_bnd);
    for cap in (0u32..64).filter(|cap| dropped & (1 << cap) != 0) {
        let args = [PR_CAPBSET_DROP.into(), cap.into()];
        program.call(
            nr::PRCTL,
            &args,
            Rule::Ok,
            "dropping a capability from the bounding set",
        );
    }
}

/// Sets the effective, permitted and inheritable sets.
fn plan_capabilities(program: &mut Program, sets: [&[u32]; 3]) {
    // struct __user_cap_header_struct: version, pid (0: the caller).
    let mut header = CAPABILITY_VERSION_3.to_le_bytes().to_vec();
    header.extend([0; 4]);
    let header = program.data(&header);
    let word = |words: &[u32], nth: usize| words.get(nth).copied().unwrap_or(0).to_le_bytes();
    let data: Vec<u8> = [0, 1]
        .into_iter()
        .flat_map(|nth| sets.map(|set| word(set, nth)))
        .flatten()
        .collect();
    let data = program.data(&data);
    program.call(
        nr::CAPSET,
        &[header.into(), data.into()],
        Rule::Ok,
        "setting capabilities",
    );
}

fn plan_ambient_set(program: &mut Program, wanted: &CredsEntry, own: &CredsEntry) {
    let (wanted, own) = (joined(&wanted.cap_amb), joined(&own.cap_amb));
    for (change, caps) in [
        (PR_CAP_AMBIENT_LOWER, own & !wanted),
        (PR_CAP_AMBIENT_RAISE, wanted & !own),
    ] {
        for cap in (0u32..64).filter(|cap| caps & (1 << cap) != 0) {
            let args = [PR_CAP_AMBIENT.into(), change.into(), cap.into()];
            program.call(nr::PRCTL, &args, Rule::Ok, "changing the ambient set");
        }
    }
}

fn plan_no_new_privs(program: &mut Program, wanted: &CredsEntry, own: &CredsEntry) {
    if wanted.no_new_privs == Some(1) && own.no_new_privs != Some(1) {
        let args = [PR_SET_NO_NEW_PRIVS.into(), 1.into()];
        program.call(nr::PRCTL, &args, Rule::Ok, "setting no_new_privs");
    }
}

/// Names of capabilities that the image wants and the restoring process can't give; None when there are none.
pub fn missing(wanted: &CredsEntry, own: &CredsEntry) -> Option<String> {
    let mut may_inherit = joined(&own.cap_bnd);
    if !permits(own, CAP_SETPCAP) {
        may_inherit &= joined(&own.cap_prm);
    }
    let lacks_permitted = joined(&wanted.cap_prm) & !joined(&own.cap_prm);
    let lacks_inheritable = joined(&wanted.cap_inh) & !(may_inherit | joined(&own.cap_inh));
    names(lacks_permitted | lacks_inheritable)
}

/// What a thread does not get back and goes on without, in words.
pub fn losses(wanted: &CredsEntry, own: &CredsEntry) -> Vec<String> {
    let bounded = names(joined(&wanted.cap_bnd) & !joined(&own.cap_bnd)).map(|names| {
        format!(
            "programs that it executes can't get {names} any more, which this process can't pass on"
        )
    });
    let bars = own.no_new_privs == Some(1) && wanted.no_new_privs == Some(0);
    let barred = bars.then(|| {
        "it gets no_new_privs, which this process has: programs that it executes get no more rights than it has"
            .to_owned()
    });
    bounded.into_iter().chain(barred).collect()
}

fn names(set: u64) -> Option<String> {
    let known = NAMES.iter().map(|name| format!("CAP_{name}"));
    let others = (NAMES.len()..64).map(|nth| format!("capability {nth}"));
    let all = known.chain(others).enumerate();
    let names: Vec<String> = all
        .filter(|(nth, _)| set & (1 << nth) != 0)
        .map(|(_, name)| name)
        .collect();
    (!names.is_empty()).then(|| names.join(", "))
}

/// True when a capability is in the permitted set.
pub fn permits(creds: &CredsEntry, capability: u32) -> bool {
    joined(&creds.cap_prm) & (1 << capability) != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> CredsEntry {
        CredsEntry {
            cap_prm: vec![!0, 0x1ff],
            cap_eff: vec![!0, 0x1ff],
            cap_inh: vec![0, 0],
            cap_bnd: vec![!0, 0x1ff],
            cap_amb: vec![0, 0],
            no_new_privs: Some(0),
            ..CredsEntry::default()
        }
    }

    #[test]
    fn the_restorers_own_credentials_need_no_record() {
        let mut program = Program::new("test");
        plan(&mut program, &root(), &root());
        assert!(program.is_empty());
    }

    #[test]
    fn ids_change_before_capabilities_go() {
        let user = CredsEntry {
            uid: 1000,
            euid: 1000,
            cap_prm: vec![0, 0],
            cap_eff: vec![0, 0],
            ..root()
        };
        let mut program = Program::new("test");
        plan(&mut program, &user, &root());
        let calls: Vec<String> = (0..program.len())
            .map(|nth| program.describe(nth))
            .collect();
        let position = |name: &str| {
            calls
                .iter()
                .position(|call| call.starts_with(name))
                .unwrap()
        };
        assert!(position("setresgid") < position("setresuid"));
        assert!(position("setresuid") < position("capset"));
    }

    #[test]
    fn what_can_not_come_back_is_told() {
        let own = CredsEntry {
            cap_bnd: vec![!(1 << 13), 0x1ff],
            no_new_privs: Some(1),
            ..root()
        };
        let lost = losses(&root(), &own);
        assert!(lost[0].contains("CAP_NET_RAW") && lost[1].contains("no_new_privs"));
        assert!(losses(&own, &own).is_empty() && losses(&own, &root()).is_empty());
        // Inheritable ones come from the bounding set, and not from there alone without CAP_SETPCAP.
        let wanted = CredsEntry {
            cap_inh: vec![1 << 13 | 1, 0],
            ..root()
        };
        assert_eq!(missing(&wanted, &own).as_deref(), Some("CAP_NET_RAW"));
        let user = CredsEntry {
            cap_prm: vec![0, 0],
            ..root()
        };
        let bare = CredsEntry {
            cap_prm: vec![0, 0],
            ..wanted
        };
        assert_eq!(
            missing(&bare, &user).as_deref(),
            Some("CAP_CHOWN, CAP_NET_RAW")
        );
    }

    #[test]
    fn words_join_low_first() {
        assert_eq!(joined(&halves(0x1_0000_0002)), 0x1_0000_0002);
        let wanted = CredsEntry {
            cap_prm: vec![0, 1 << 8],
            ..root()
        };
        let own = CredsEntry {
            cap_prm: vec![!0, 0],
            ..root()
        };
        assert_eq!(
            missing(&wanted, &own).as_deref(),
            Some("CAP_CHECKPOINT_RESTORE")
        );
        assert_eq!(missing(&own, &own), None);
    }
}
