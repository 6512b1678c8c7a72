//! `firn ploop snapshot` and its family.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use firn_ploop::BitmapChange;
use firn_ploop::descriptor::{Guid, ImageEntry};
use firn_ploop::folder::{Folder, NewSnapshot};
use firn_ploop::server::Record;
use serde_json::{Map, Value, json};

use super::live;
use super::report::{Steps, answer, failure};
use super::words::{DiskArgs, closed_disk};
use crate::output::Failure;

/// Options of snapshot.
#[derive(Debug, Args)]
pub struct NewArgs {
    /// Name of the snapshot [default: a random one]
    #[arg(short, long, value_name = "UUID")]
    uuid: Option<Guid>,
    /// Freeze the file system of a mounted disk meanwhile, so that the snapshot needs no recovery
    #[arg(short = 'F', long)]
    fsfreeze: bool,
    #[command(flatten)]
    disk: DiskArgs,
}

/// Options of snapshot-switch and snapshot-delete.
#[derive(Debug, Args)]
pub struct OneArgs {
    /// The snapshot
    #[arg(short, long, value_name = "UUID")]
    uuid: Guid,
    #[command(flatten)]
    disk: DiskArgs,
}

/// Options of snapshot-merge.
#[derive(Debug, Args)]
pub struct MergeArgs {
    /// Merge this one [default: what was written since the last snapshot]
    #[arg(short, long, value_name = "UUID", conflicts_with = "all")]
    uuid: Option<Guid>,
    /// Merge everything down to the base
    #[arg(short = 'A', long)]
    all: bool,
    /// Write both into this new file in the disk's directory, instead of one into the other
    #[arg(short, long, value_name = "FILE", conflicts_with = "all")]
    new: Option<PathBuf>,
    #[command(flatten)]
    disk: DiskArgs,
}

/// Options of snapshot-list.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Print no header
    #[arg(short = 'H', long)]
    no_header: bool,
    /// Print these columns
    #[arg(
        short,
        long,
        value_name = "COLUMNS",
        value_enum,
        value_delimiter = ',',
        default_value = "parent-uuid,current,uuid,fname"
    )]
    output: Vec<Column>,
    /// Only this one
    #[arg(short, long, value_name = "UUID")]
    uuid: Option<Guid>,
    /// Leave out what is no snapshot: the current state
    #[arg(short, long)]
    snapshots: bool,
    #[command(flatten)]
    disk: DiskArgs,
}

/// A column of the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Column {
    /// The one that it descends from
    #[value(name = "parent-uuid", alias = "parent_uuid")]
    ParentUuid,
    /// A star for the current state
    Current,
    /// Its name
    Uuid,
    /// Its file
    Fname,
}

impl Column {
    fn title(self) -> &'static str {
        match self {
            Column::ParentUuid => "PARENT_UUID",
            Column::Current => "C",
            Column::Uuid => "UUID",
            Column::Fname => "FNAME",
        }
    }

    fn width(self) -> usize {
        match self {
            Column::ParentUuid | Column::Uuid => 38,
            Column::Current => 1,
            Column::Fname => 0,
        }
    }
}

/// Makes a snapshot.
pub fn new(args: &NewArgs) -> Result<u8, Failure> {
    if let Some(record) = live::served(&args.disk.disk)? {
        let id = args.uuid.map(|id| id.to_string());
        let made = live::connect(&record)?.snapshot(id, args.fsfreeze);
        let (id, took) = made.map_err(|error| live::refused(&error, error.exit_code()))?;
        let object = json!({ "uuid": id, "took_us": took.as_secs_f64() * 1e6 });
        return answer(args.disk.json, &object, &format!("{id}\n"));
    }
    let mut folder = open(&args.disk)?;
    let id = match args.uuid {
        Some(id) => id,
        None => {
            Guid::random().map_err(|error| Failure::io("no random name can be made", &error))?
        }
    };
    let new = NewSnapshot {
        id,
        running: None,
        bitmap: BitmapChange::Keep,
        temporary: None,
    };
    folder
        .snapshot(new, &closed_disk())
        .map_err(|error| failure(&error))?;
    answer(
        args.disk.json,
        &json!({ "uuid": id.to_string() }),
        &format!("{id}\n"),
    )
}

/// Goes back to a snapshot.
pub fn switch(args: &OneArgs) -> Result<u8, Failure> {
    open(&args.disk)?
        .switch(args.uuid, &closed_disk())
        .map_err(|error| failure(&error))?;
    done(&args.disk, "switched", args.uuid)
}

/// Deletes a snapshot.
pub fn delete(args: &OneArgs) -> Result<u8, Failure> {
    if let Some(record) = live::served(&args.disk.disk)? {
        let mut steps = Steps::of("merging", args.disk.json);
        let id = args.uuid.to_string();
        let mut show = |now, all| steps.show(now, all);
        let deleted = live::connect(&record)?.snapshot_delete(id, &mut show);
        drop(steps);
        deleted.map_err(|error| live::refused(&error, error.exit_code()))?;
        return done(&args.disk, "deleted", args.uuid);
    }
    let mut steps = Steps::of("merging", args.disk.json);
    open(&args.disk)?
        .delete(args.uuid, None, &closed_disk(), &mut |now, all| {
            steps.show(now, all)
        })
        .map_err(|error| failure(&error))?;
    drop(steps);
    done(&args.disk, "deleted", args.uuid)
}

/// Merges.
pub fn merge(args: &MergeArgs) -> Result<u8, Failure> {
    if let Some(record) = live::served(&args.disk.disk)? {
        return merge_served(args, &record);
    }
    let mut folder = open(&args.disk)?;
    let mut steps = Steps::of("merging", args.disk.json);
    let mut show = |now, all| steps.show(now, all);
    let mut merges = 0;
    if let Some(file) = &args.new {
        folder
            .merge_into_new(args.uuid, file.clone(), &closed_disk(), &mut show)
            .map_err(|error| failure(&error))?;
        merges = 1;
    } else {
        while merges == 0 || (args.all && has_more(&folder)) {
            folder
                .merge(args.uuid, None, &closed_disk(), &mut show)
                .map_err(|error| failure(&error))?;
            merges += 1;
        }
    }
    drop(steps);
    tell_merges(args, merges)
}

fn tell_merges(args: &MergeArgs, merges: u32) -> Result<u8, Failure> {
    let text = match merges {
        1 => "merged\n".to_owned(),
        count => format!("merged {count} times\n"),
    };
    answer(args.disk.json, &json!({ "merges": merges }), &text)
}

fn merge_served(args: &MergeArgs, record: &Record) -> Result<u8, Failure> {
    if args.new.is_some() {
        return Err(Failure::usage(
            "a mounted disk can't be merged into a new file",
        ));
    }
    let mut client = live::connect(record)?;
    let mut steps = Steps::of("merging", args.disk.json);
    let mut merges = 0;
    loop {
        let id = args.uuid.map(|id| id.to_string());
        let merged = client.merge(id, &mut |now, all| steps.show(now, all));
        merged.map_err(|error| live::refused(&error, error.exit_code()))?;
        merges += 1;
        let folder = Folder::view(&args.disk.disk).map_err(|error| failure(&error))?;
        if !args.all || !has_more(&folder) {
            drop(steps);
            return tell_merges(args, merges);
        }
    }
}

/// Whether the top lies on an image that it can be merged into: a base of many disks stays.
fn has_more(folder: &Folder) -> bool {
    let descriptor = folder.descriptor();
    let parent = descriptor.shot(Guid::TOP).map(|top| top.parent);
    let below = parent.and_then(|parent| descriptor.image(parent));
    below.is_ok_and(|below| folder.owns(below))
}

fn open(disk: &DiskArgs) -> Result<Folder, Failure> {
    Folder::open(&disk.disk).map_err(|error| failure(&error))
}

fn done(disk: &DiskArgs, verb: &str, id: Guid) -> Result<u8, Failure> {
    let object = json!({ verb: id.to_string() });
    answer(disk.json, &object, &format!("{verb} {id}\n"))
}

/// Lists snapshots.
pub fn list(args: &ListArgs) -> Result<u8, Failure> {
    let folder = Folder::view(&args.disk.disk).map_err(|error| failure(&error))?;
    if let Some(wanted) = args.uuid {
        let found = folder.descriptor().shot(wanted);
        found.map_err(|error| Failure {
            code: 43,
            ..Failure::new("usage", error.to_string())
        })?;
    }
    let mut rows = Vec::new();
    for image in &folder.descriptor().images {
        let hidden = args.snapshots && image.guid == Guid::TOP;
        if !hidden && args.uuid.is_none_or(|wanted| wanted == image.guid) {
            rows.push(image);
        }
    }
    let mut text = String::new();
    if !args.no_header {
        text += &line(&args.output, |column| column.title().to_owned());
    }
    for image in &rows {
        text += &line(&args.output, |column| cell(&folder, image, column));
    }
    let objects: Vec<Value> = rows.iter().map(|image| object(&folder, image)).collect();
    answer(args.disk.json, &json!({ "snapshots": objects }), &text)
}

fn line(columns: &[Column], cell: impl Fn(Column) -> String) -> String {
    let cells = columns.iter().map(|column| {
        let text = cell(*column);
        format!("{text:<width$}", width = column.width())
    });
    let cells: Vec<String> = cells.collect();
    format!("{}\n", cells.join(" ").trim_end())
}

fn cell(folder: &Folder, image: &ImageEntry, column: Column) -> String {
    let parent = folder.descriptor().shot(image.guid).map(|shot| shot.parent);
    match column {
        Column::ParentUuid => match parent {
            Ok(parent) if parent != Guid::NIL => parent.to_string(),
            _ => String::new(),
        },
        Column::Current => match image.guid == Guid::TOP {
            true => "*".to_owned(),
            false => String::new(),
        },
        Column::Uuid => image.guid.to_string(),
        Column::Fname => folder.path_of(image).display().to_string(),
    }
}

fn object(folder: &Folder, image: &ImageEntry) -> Value {
    let mut object = Map::new();
    for (name, column) in [
        ("parent_uuid", Column::ParentUuid),
        ("uuid", Column::Uuid),
        ("fname", Column::Fname),
    ] {
        object.insert(name.to_owned(), cell(folder, image, column).into());
    }
    object.insert("current".to_owned(), (image.guid == Guid::TOP).into());
    object.into()
}
