//! The lock as rules of iptables, for kernels without nftables and for dumps of CRIU, which uses it by
//! default. CRIU calls `iptables`; where that means nftables and the kernel has none, `iptables-legacy` does
//! the work. All rules go in, or out, by one `iptables-restore` per address family.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::SocketAddr;
use std::process::{Command, Output, Stdio};

use super::{Connection, NetworkLockError, PASS_MARK};

/// What the names of the programs have behind `iptables`.
const VARIANTS: [&str; 2] = ["", "-legacy"];
/// What they begin with, and whether that is for IPv4.
const FAMILIES: [(&str, bool); 2] = [("iptables", true), ("ip6tables", false)];

/// Adds the rules; on an error none is left.
pub(super) fn lock(connections: &[Connection]) -> Result<(), NetworkLockError> {
    let [first, second] = VARIANTS;
    lock_by(first, connections).or_else(|_| lock_by(second, connections))
}

fn lock_by(variant: &str, connections: &[Connection]) -> Result<(), NetworkLockError> {
    change(variant, "-I", connections).inspect_err(|_| {
        // One family may have its rules.
        let _ = change(variant, "-D", connections);
    })
}

/// Removes the rules.
pub(super) fn unlock(connections: &[Connection]) -> Result<(), NetworkLockError> {
    match find(connections) {
        Some(variant) => change(variant, "-D", connections),
        None => Ok(()),
    }
}

/// Whether the rules of the first connection are there.
pub(super) fn is_locked(connections: &[Connection]) -> bool {
    find(connections).is_some()
}

/// The variant that has the rules of the first connection.
fn find(connections: &[Connection]) -> Option<&'static str> {
    let connection = connections.first()?;
    let (name, _) = family(connection.local);
    let has_rules = |variant: &&str| {
        let mut words = vec!["-w", "-t", "filter"];
        let rule = rule("-C", "INPUT", connection.remote, connection.local);
        words.extend(rule.split(' '));
        let mut check = Command::new(format!("{name}{variant}"));
        run(check.args(words), "").is_ok_and(|output| output.status.success())
    };
    VARIANTS.into_iter().find(has_rules)
}

fn family(address: SocketAddr) -> (&'static str, bool) {
    FAMILIES[usize::from(address.is_ipv6())]
}

/// Adds or removes the rules of all connections; those of one family all together or not at all.
fn change(variant: &str, action: &str, connections: &[Connection]) -> Result<(), NetworkLockError> {
    let mut result = Ok(());
    for (name, is_v4) in FAMILIES {
        let of_family = |connection: &&Connection| connection.local.is_ipv4() == is_v4;
        let rules: String = connections.iter().filter(of_family).fold(
            String::new(),
            |mut rules, &Connection { local, remote }| {
                let (input, output) = (
                    rule(action, "INPUT", remote, local),
                    rule(action, "OUTPUT", local, remote),
                );
                writeln!(rules, "{input}\n{output}").expect("a string takes all");
                rules
            },
        );
        if !rules.is_empty() {
            let program = format!("{name}{variant}-restore");
            let done = restore(&program, &format!("*filter\n{rules}COMMIT\n"));
            result = result.and(done);
        }
    }
    result
}

fn rule(action: &str, chain: &str, from: SocketAddr, to: SocketAddr) -> String {
    format!(
        "{action} {chain} --protocol tcp -m mark ! --mark {PASS_MARK} --source {} --sport {} \
         --destination {} --dport {} -j DROP",
        from.ip(),
        from.port(),
        to.ip(),
        to.port()
    )
}

fn restore(program: &str, rules: &str) -> Result<(), NetworkLockError> {
    let failed = |what: String| NetworkLockError::Iptables(format!("{program}: {what}"));
    let mut command = Command::new(program);
    let output =
        run(command.args(["-w", "--noflush"]), rules).map_err(|error| failed(error.to_string()))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(failed(
            String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        )),
    }
}

/// Runs a command to its end, with that input.
fn run(command: &mut Command, input: &str) -> std::io::Result<Output> {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut child = command.spawn()?;
    // A program that ends before it has read all of it says why in its output.
    let _ = child
        .stdin
        .take()
        .map(|mut pipe| pipe.write_all(input.as_bytes()));
    child.wait_with_output()
}
