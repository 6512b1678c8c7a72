//! The lock as rules of iptables, for kernels without nftables and for dumps of CRIU, which uses it by
//! default. CRIU calls `iptables`; where that means nftables and the kernel has none, `iptables-legacy` does
//! the work. All rules go in, or out, by one `iptables-restore` per address family.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::{Command, Output, Stdio};

use super::{Connection, HeldOff, NetworkLockError, PASS_MARK, Port};

/// What the names of the programs have behind `iptables`.
const VARIANTS: [&str; 2] = ["", "-legacy"];
/// What they begin with, and whether that is for IPv4.
const FAMILIES: [(&str, bool); 2] = [("iptables", true), ("ip6tables", false)];

/// One of our rules: packets from an end to another, or the first ones to a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Rule {
    Packets {
        chain: &'static str,
        from: SocketAddr,
        to: SocketAddr,
    },
    First(Port),
}

impl Rule {
    /// All rules of a lock.
    fn all(held_off: &HeldOff) -> impl Iterator<Item = Rule> {
        let connections = held_off.connections.iter();
        let both = connections.flat_map(|&Connection { local, remote }| {
            let rule = |chain, from, to| Rule::Packets { chain, from, to };
            [rule("INPUT", remote, local), rule("OUTPUT", local, remote)]
        });
        both.chain(held_off.ports.iter().copied().map(Rule::First))
    }

    fn is_v4(self) -> bool {
        match self {
            Rule::Packets { from, .. } => from.is_ipv4(),
            Rule::First(port) => port.address.is_ipv4(),
        }
    }

    /// The words that make it, behind -I or -A.
    fn words(self) -> String {
        let unmarked = format!("-m mark ! --mark {PASS_MARK}");
        match self {
            Rule::Packets { chain, from, to } => format!(
                "{chain} --protocol tcp {unmarked} --source {} --sport {} --destination {} --dport {} -j DROP",
                from.ip(),
                from.port(),
                to.ip(),
                to.port()
            ),
            Rule::First(Port { address, number }) => {
                let to = match address.is_unspecified() {
                    true => String::new(),
                    false => format!(" --destination {address}"),
                };
                let flags = "--tcp-flags FIN,SYN,RST,ACK SYN";
                format!("INPUT --protocol tcp {unmarked}{to} {flags} --dport {number} -j DROP")
            }
        }
    }

    /// The rule that a line of `iptables -S` shows, if it may be ours.
    fn parse(line: &str, is_v4: bool) -> Option<Rule> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let chain = match words.get(..2)? {
            ["-A", "INPUT"] => "INPUT",
            ["-A", "OUTPUT"] => "OUTPUT",
            _ => return None,
        };
        let value = |name: &str| {
            let at = words.iter().position(|word| *word == name)?;
            words.get(at + 1).copied()
        };
        let port = |name| value(name)?.parse::<u16>().ok();
        let address = |name| -> Option<IpAddr> {
            let (address, _) = value(name)?.split_once('/')?;
            address.parse().ok()
        };
        let mark = u32::from_str_radix(value("--mark")?.strip_prefix("0x")?, 16);
        if mark != Ok(PASS_MARK) || value("-j") != Some("DROP") {
            return None;
        }
        let to = port("--dport")?;
        let Some(from) = port("--sport") else {
            let any: IpAddr = match is_v4 {
                true => Ipv4Addr::UNSPECIFIED.into(),
                false => Ipv6Addr::UNSPECIFIED.into(),
            };
            let address = address("-d").unwrap_or(any);
            let is_first = line.contains("--tcp-flags FIN,SYN,RST,ACK SYN");
            return is_first.then_some(Rule::First(Port {
                address,
                number: to,
            }));
        };
        Some(Rule::Packets {
            chain,
            from: SocketAddr::new(address("-s")?, from),
            to: SocketAddr::new(address("-d")?, to),
        })
    }
}

/// Adds the rules; on an error none is left.
pub(super) fn lock(held_off: &HeldOff) -> Result<(), NetworkLockError> {
    let [first, second] = VARIANTS;
    lock_by(first, held_off).or_else(|_| lock_by(second, held_off))
}

fn lock_by(variant: &str, held_off: &HeldOff) -> Result<(), NetworkLockError> {
    let rules: Vec<Rule> = Rule::all(held_off).collect();
    change(variant, "-I", &rules).inspect_err(|_| {
        // One family may have its rules.
        let _ = change(variant, "-D", &rules);
    })
}

/// Removes those of the rules that are there, and tells whether there were any.
pub(super) fn unlock(held_off: &HeldOff) -> Result<bool, NetworkLockError> {
    let mut found = false;
    for variant in VARIANTS {
        let there = there(variant, held_off);
        if !there.is_empty() {
            change(variant, "-D", &there)?;
            found = true;
        }
    }
    Ok(found)
}

/// Whether one of the rules is there.
pub(super) fn is_locked(held_off: &HeldOff) -> bool {
    let mut variants = VARIANTS.into_iter();
    variants.any(|variant| !there(variant, held_off).is_empty())
}

/// The rules of a lock that a variant of the program shows.
fn there(variant: &str, held_off: &HeldOff) -> Vec<Rule> {
    let ours: HashSet<Rule> = Rule::all(held_off).collect();
    let mut found = Vec::new();
    for (name, is_v4) in FAMILIES {
        if !ours.iter().any(|rule| rule.is_v4() == is_v4) {
            continue;
        }
        let mut list = Command::new(format!("{name}{variant}"));
        let Ok(output) = run(list.args(["-w", "-t", "filter", "-S"]), "") else {
            continue;
        };
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let shown = text.lines().filter_map(|line| Rule::parse(line, is_v4));
        found.extend(shown.filter(|rule| ours.contains(rule)));
    }
    found
}

/// Adds or removes rules; those of one family all together or not at all.
fn change(variant: &str, action: &str, rules: &[Rule]) -> Result<(), NetworkLockError> {
    let mut result = Ok(());
    for (name, is_v4) in FAMILIES {
        let mut text = String::new();
        for rule in rules.iter().filter(|rule| rule.is_v4() == is_v4) {
            writeln!(text, "{action} {}", rule.words()).expect("a string takes all");
        }
        if !text.is_empty() {
            let program = format!("{name}{variant}-restore");
            let done = restore(&program, &format!("*filter\n{text}COMMIT\n"));
            result = result.and(done);
        }
    }
    result
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
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn()?;
    // A program that ends before it has read all of it says why in its output.
    let _ = child
        .stdin
        .take()
        .map(|mut pipe| pipe.write_all(input.as_bytes()));
    child.wait_with_output()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_known_again_as_the_program_shows_them() {
        let packets = "-A OUTPUT -s 10.0.0.1/32 -d 10.0.0.2/32 -p tcp -m mark ! --mark 0xc114 -m tcp --sport 80 \
                       --dport 4711 -j DROP";
        let expected = Rule::Packets {
            chain: "OUTPUT",
            from: "10.0.0.1:80".parse().expect("an address"),
            to: "10.0.0.2:4711".parse().expect("an address"),
        };
        assert_eq!(Rule::parse(packets, true), Some(expected));
        let first = "-A INPUT -d ::1/128 -p tcp -m mark ! --mark 0xc114 -m tcp --dport 80 \
                     --tcp-flags FIN,SYN,RST,ACK SYN -j DROP";
        let expected = Port {
            address: Ipv6Addr::LOCALHOST.into(),
            number: 80,
        };
        assert_eq!(Rule::parse(first, false), Some(Rule::First(expected)));
        let any = first.replace("-d ::1/128 ", "");
        let expected = Port {
            address: Ipv6Addr::UNSPECIFIED.into(),
            number: 80,
        };
        assert_eq!(Rule::parse(&any, false), Some(Rule::First(expected)));
        for other in [
            "-P INPUT ACCEPT",
            "-A INPUT -p tcp -m tcp --dport 80 -j DROP",
        ] {
            assert_eq!(Rule::parse(other, true), None);
        }
    }
}
