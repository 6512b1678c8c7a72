//! `firn ploop check`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;
use firn_ploop::descriptor::Guid;
use firn_ploop::folder::{Folder, FolderCheck};
use firn_ploop::format::expanded::{self, Finding, Repair, Severity};
use firn_ploop::{Access, Format, HostFile};
use serde_json::{Value, json};

use super::report::{Steps, answer, failure};
use crate::output::{Failure, counted};

/// Options of check.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Mend what can be mended; clusters that point nowhere become zeroes
    #[arg(long)]
    repair: bool,
    /// Check the images up to this snapshot [default: all of the current state]
    #[arg(short, long, value_name = "UUID")]
    uuid: Option<Guid>,
    /// Descriptor of the disk, its directory, or one image
    #[arg(value_name = "DiskDescriptor.xml|FILE")]
    path: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Checks.
pub fn run(args: &CheckArgs) -> Result<u8, Failure> {
    let repair = match args.repair {
        true => Repair::Yes,
        false => Repair::No,
    };
    if is_image(&args.path) {
        return one_image(args, repair);
    }
    let mut folder = Folder::open(&args.path).map_err(|error| failure(&error))?;
    let mut steps = Steps::of("checking", args.json);
    let checked = folder.check(args.uuid, repair, &mut |now, all| steps.show(now, all));
    drop(steps);
    let checked = checked.map_err(|error| failure(&error))?;
    let mut text = String::new();
    for image in &checked.images {
        let path = image.path.display().to_string();
        text += &lines(&path, &image.findings, &image.left, &image.lost);
    }
    for what in &checked.disagreements {
        let _ = writeln!(text, "{}: {what}", folder.xml().display());
    }
    for stranger in &checked.strangers {
        let _ = writeln!(text, "{}: no image of this disk", stranger.display());
    }
    text += &verdict(checked.worst(), checked.images.len());
    answer(args.json, &object(&checked), &text)?;
    Ok(status(checked.worst()))
}

/// Whether a file begins like an image.
fn is_image(path: &Path) -> bool {
    path.is_file()
        && HostFile::open(path, Access::ReadOnly)
            .is_ok_and(|file| Format::detect(&file).is_ok_and(|format| format != Format::Raw))
}

fn one_image(args: &CheckArgs, repair: Repair) -> Result<u8, Failure> {
    let access = match repair {
        Repair::Yes => Access::ReadWrite,
        Repair::No => Access::ReadOnly,
    };
    let name = args.path.display().to_string();
    let file = HostFile::open(&args.path, access)
        .map_err(|error| Failure::io(format!("{name} can't be opened"), &error))?;
    if access == Access::ReadOnly && file.has_writer().is_ok_and(|has| has) {
        let what = format!("{name} is in use: another program has it open for writing");
        return Err(Failure {
            code: 37,
            ..Failure::new("refused", what).hint("unmount it first")
        });
    }
    let mut steps = Steps::of("checking", args.json);
    let checked = expanded::check_telling(&file, repair, &mut |now, all| {
        steps.show(now, all);
    });
    drop(steps);
    let checked = checked.map_err(|error| failure(&error.into()))?;
    let text = lines(&name, &checked.findings, &checked.left, &checked.lost)
        + &verdict(checked.worst(), 1);
    let object = json!({
        "whole": status(checked.worst()) == 0,
        "images": [image(&name, "expanded", &checked.findings, &checked.left, &checked.lost)],
        "disagreements": [],
        "strangers": [],
    });
    answer(args.json, &object, &text)?;
    Ok(status(checked.worst()))
}

fn lines(path: &str, findings: &[Finding], left: &[Finding], lost: &[u32]) -> String {
    let mut text = String::new();
    for finding in findings {
        let mended = match left.contains(finding) || finding.severity() == Severity::Note {
            true => "",
            false => " (mended)",
        };
        let _ = writeln!(text, "{path}: {finding}{mended}");
    }
    if !lost.is_empty() {
        let lost_count = counted(lost.len(), "cluster");
        let _ = writeln!(
            text,
            "{path}: {lost_count} pointed nowhere and became zeroes"
        );
    }
    text
}

fn verdict(worst: Option<Severity>, images: usize) -> String {
    let seen = counted(images, "image");
    match worst {
        None | Some(Severity::Note) => format!("whole: {seen}\n"),
        Some(Severity::Leak) => format!("space is lost, no data: {seen}\n"),
        Some(Severity::Damage) => format!("not whole: {seen}\n"),
    }
}

fn status(worst: Option<Severity>) -> u8 {
    u8::from(worst > Some(Severity::Note))
}

fn object(checked: &FolderCheck) -> Value {
    let images = checked.images.iter().map(|done| {
        let path = done.path.to_string_lossy();
        let format = done.format.name();
        image(&path, format, &done.findings, &done.left, &done.lost)
    });
    let images: Vec<Value> = images.collect();
    json!({
        "whole": status(checked.worst()) == 0,
        "images": images,
        "disagreements": checked.disagreements,
        "strangers": checked.strangers,
        "finished_merge": checked.finished_merge,
    })
}

fn image(path: &str, format: &str, findings: &[Finding], left: &[Finding], lost: &[u32]) -> Value {
    let findings = findings.iter().map(|finding| {
        json!({
            "name": finding.name(),
            "severity": match finding.severity() {
                Severity::Note => "note",
                Severity::Leak => "leak",
                Severity::Damage => "damage",
            },
            "text": finding.to_string(),
            "mended": !left.contains(finding),
        })
    });
    let findings: Vec<Value> = findings.collect();
    json!({ "path": path, "format": format, "findings": findings, "lost_clusters": lost })
}
