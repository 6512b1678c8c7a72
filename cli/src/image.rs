//! `firn image`: looking into image files.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use firn_images::tools::{self, CheckReport, DecodeError, JsonStyle};
use firn_images::{Header, ImageDir};

use crate::output::{Failure, counted};

/// Options of image.
#[derive(Debug, Args)]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub struct ImageArgs {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Print images for people: indented, with addresses and flags in words
    Show {
        /// Image files or directories of images
        #[arg(required = true)]
        paths: Vec<PathBuf>,
    },
    /// Turn an image into JSON
    Decode {
        /// Image file
        #[arg(required_unless_present = "input")]
        file: Option<PathBuf>,
        /// Image file, as crit takes it
        #[arg(short, long = "in", value_name = "FILE", conflicts_with = "file")]
        input: Option<PathBuf>,
        /// Write to this file [default: stdout]
        #[arg(short, long = "out", value_name = "FILE")]
        output: Option<PathBuf>,
        /// Indent, with addresses and flags in words
        #[arg(long)]
        pretty: bool,
    },
    /// Turn such JSON back into an image
    Encode {
        /// JSON file [default: stdin]
        file: Option<PathBuf>,
        /// JSON file, as crit takes it
        #[arg(short, long = "in", value_name = "FILE", conflicts_with = "file")]
        input: Option<PathBuf>,
        /// Write to this file [default: stdout]
        #[arg(short, long = "out", value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Prove that a directory is whole; status 1 says that it is not
    Check {
        /// Directory of images
        #[arg(default_value = ".")]
        dir: PathBuf,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Explain a checkpoint: processes, memory, files, sizes
    Info {
        /// Directory of images
        #[arg(default_value = ".")]
        dir: PathBuf,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

/// Does it.
pub fn run(args: &ImageArgs) -> Result<u8, Failure> {
    match &args.task {
        Task::Show { paths } => show(paths),
        Task::Decode {
            file,
            input,
            output,
            pretty,
        } => {
            let path = file
                .as_ref()
                .or(input.as_ref())
                .expect("clap requires one of them");
            let style = if *pretty {
                JsonStyle::Pretty
            } else {
                JsonStyle::Compact
            };
            into(output.as_deref(), |out| decode(path, style, out))
        }
        Task::Encode {
            file,
            input,
            output,
        } => {
            let json = source(file.as_deref().or(input.as_deref()))?;
            into(output.as_deref(), |out| {
                tools::encode(json, out).map_err(|error| corrupt(&error))
            })
        }
        Task::Check { dir, json } => check(dir, *json),
        Task::Info { dir, json } => info(dir, *json),
    }
}

fn corrupt(error: &(impl std::error::Error + 'static)) -> Failure {
    Failure::new("corrupt", error.to_string()).caused_by(error)
}

fn show(paths: &[PathBuf]) -> Result<u8, Failure> {
    for path in paths {
        if !path.is_dir() {
            into(None, |out| decode(path, JsonStyle::Pretty, out))?;
            continue;
        }
        let dir = ImageDir::open(path).map_err(|error| corrupt(&error))?;
        for file in dir.files().map_err(|error| corrupt(&error))? {
            if file.kind.info().header == Header::Raw {
                continue;
            }
            let path = dir.path_of(file.kind, file.id);
            into(None, |out| {
                writeln!(out, "{}", path.display()).map_err(|error| unwritten(&error))?;
                decode(&path, JsonStyle::Pretty, out)
            })?;
        }
    }
    Ok(0)
}

fn decode(path: &Path, style: JsonStyle, mut out: &mut dyn Write) -> Result<(), Failure> {
    tools::decode_file(path, style, &mut out).map_err(|error| match error {
        DecodeError::Write(error) => unwritten(&error),
        other => corrupt(&other),
    })?;
    writeln!(out).map_err(|error| unwritten(&error))
}

fn unwritten(error: &io::Error) -> Failure {
    Failure::io("the output can't be written", error)
}

fn source(path: Option<&Path>) -> Result<Box<dyn Read>, Failure> {
    match path {
        None => Ok(Box::new(io::stdin())),
        Some(path) if path.as_os_str() == "-" => Ok(Box::new(io::stdin())),
        Some(path) => {
            let file = File::open(path).map_err(|error| {
                Failure::io(format!("{} can't be opened", path.display()), &error)
            })?;
            Ok(Box::new(BufReader::new(file)))
        }
    }
}

/// Lets `work` write to a file that appears only when it is complete, or to stdout.
fn into(
    path: Option<&Path>,
    work: impl FnOnce(&mut dyn Write) -> Result<(), Failure>,
) -> Result<u8, Failure> {
    let Some(path) = path.filter(|path| path.as_os_str() != "-") else {
        return quiet_at_closed_pipe(work);
    };
    let failed =
        |error: io::Error| Failure::io(format!("{} can't be written", path.display()), &error);
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let part = path.with_file_name(name);
    let mut file = File::create_new(&part).map_err(failed)?;
    let done = work(&mut file).and_then(|()| std::fs::rename(&part, path).map_err(failed));
    if done.is_err() {
        let _ = std::fs::remove_file(&part);
    }
    done.map(|()| 0)
}

/// Writes to stdout; a reader that has seen enough, such as head, is no error.
fn quiet_at_closed_pipe(
    work: impl FnOnce(&mut dyn Write) -> Result<(), Failure>,
) -> Result<u8, Failure> {
    let mut out = Pipe {
        out: io::stdout().lock(),
        closed: false,
    };
    let done = work(&mut out).and_then(|()| out.flush().map_err(|error| unwritten(&error)));
    if out.closed { Ok(0) } else { done.map(|()| 0) }
}

struct Pipe<W> {
    out: W,
    closed: bool,
}

impl<W: Write> Write for Pipe<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let result = self.out.write(bytes);
        self.note(result)
    }

    fn flush(&mut self) -> io::Result<()> {
        let result = self.out.flush();
        self.note(result)
    }
}

impl<W> Pipe<W> {
    fn note<T>(&mut self, result: io::Result<T>) -> io::Result<T> {
        self.closed |= matches!(&result, Err(error) if error.kind() == io::ErrorKind::BrokenPipe);
        result
    }
}

fn check(dir: &Path, json: bool) -> Result<u8, Failure> {
    let report = tools::check(dir).map_err(|error| corrupt(&error))?;
    if json {
        print_json(&report)?;
    } else {
        into(None, |out| {
            out.write_all(verdict(&report).as_bytes())
                .map_err(|error| unwritten(&error))
        })?;
    }
    Ok(u8::from(!report.is_whole()))
}

fn verdict(report: &CheckReport) -> String {
    let mut text = String::new();
    for problem in &report.problems {
        text.push_str(&format!("problem: {problem}\n"));
    }
    for remark in &report.remarks {
        text.push_str(&format!("remark: {remark}\n"));
    }
    let seen = format!(
        "{}, {}, {}, {}",
        counted(report.images, "image"),
        counted(report.tasks, "task"),
        counted(report.threads, "thread"),
        counted(usize::try_from(report.pages).unwrap_or(usize::MAX), "page"),
    );
    let end = match report.problems.len() {
        0 => format!("whole: {seen}\n"),
        n => format!("not whole: {} in {seen}\n", counted(n, "problem")),
    };
    text + &end
}

fn print_json(value: &impl serde::Serialize) -> Result<u8, Failure> {
    into(None, |out| {
        serde_json::to_writer(&mut *out, value).map_err(|error| unwritten(&error.into()))?;
        writeln!(out).map_err(|error| unwritten(&error))
    })
}

fn info(dir: &Path, json: bool) -> Result<u8, Failure> {
    let info = tools::info(dir).map_err(|error| corrupt(&error))?;
    if json {
        return print_json(&info);
    }
    into(None, |out| {
        write!(out, "{info}").map_err(|error| unwritten(&error))
    })
}
