//! Man pages, from the same definitions as help and completions.

use std::io::Write;
use std::path::Path;

use clap::Command;
use clap_mangen::Man;

use crate::output::Failure;

const EXIT_STATUS: &str = r#".SH "EXIT STATUS"
.TP
\fB0\fR
Done. A restore in the foreground ends with the status of the restored root task instead, 128 and the
number of the signal that killed it.
.TP
\fB1\fR
It failed; the tasks run as before, or whatever had been made is gone again. A dump whose
\fBpost\-dump\fR script failed ends with the script's status.
.TP
\fB2\fR
The command line or a configuration file is wrong.
"#;

const PLOOP_STATUS: &str = r#".SH "EXIT STATUS"
.TP
\fB0\fR
Done. \fBcheck\fR: the disk is whole.
.TP
\fB1\fR
\fBcheck\fR: something is left to mend.
.TP
\fB2\fR
The command line is wrong.
.TP
\fB4\fR, \fB6\fR, \fB7\fR, \fB16\fR
A file can't be opened, read, written, synced.
.TP
\fB11\fR, \fB39\fR
An image, the descriptor is damaged.
.TP
\fB23\fR, \fB37\fR
Another command has the disk, an image is in use or was not closed.
.TP
\fB29\fR
Called off.
.TP
\fB38\fR, \fB43\fR
What was asked can't be, there is no such snapshot.
"#;

const FILES: &str = r#".SH FILES
.TP
\fI/etc/criu/default.conf\fR, \fI$HOME/.criu/default.conf\fR
Options for all commands of CRIU's family, one a line without dashes, the value after white space, in
double quotes where it has spaces; # starts a comment.
.TP
\fI$CRIU_CONFIG_FILE\fR
Read after these two. The file of \fB\-\-config\fR is read last and leaves the two out. The command
line wins over all.
"#;

const ENVIRONMENT: &str = r#".SH ENVIRONMENT
Action scripts find these variables:
.TP
\fBCRTOOLS_SCRIPT_ACTION\fR
\fBpre\-dump\fR, \fBpost\-dump\fR, \fBpre\-restore\fR, \fBpost\-restore\fR, \fBpre\-resume\fR or
\fBpost\-resume\fR. A failure of the last two is only logged, one of the others ends the operation.
.TP
\fBCRTOOLS_IMAGE_DIR\fR
The image directory, as a path under \fI/proc\fR.
.TP
\fBCRTOOLS_INIT_PID\fR
The pid of the root task, once it is known.
"#;

/// Writes one page per command.
///
/// # Errors
/// The directory can't be made or a page can't be written.
pub fn write(dir: &Path) -> Result<(), Failure> {
    let failed = |error: std::io::Error| {
        Failure::io(
            format!("man pages can't be written to {}", dir.display()),
            &error,
        )
    };
    std::fs::create_dir_all(dir).map_err(failed)?;
    let mut root = crate::args::definitions();
    root.build();
    page(&root, "firn", dir).map_err(failed)?;
    for command in root
        .get_subcommands()
        .filter(|command| !command.is_hide_set())
    {
        page(command, &format!("firn-{}", command.get_name()), dir).map_err(failed)?;
        for inner in command
            .get_subcommands()
            .filter(|inner| inner.get_name() != "help")
        {
            let name = format!("firn-{}-{}", command.get_name(), inner.get_name());
            page(inner, &name, dir).map_err(failed)?;
        }
    }
    Ok(())
}

fn page(command: &Command, name: &str, dir: &Path) -> std::io::Result<()> {
    let man = Man::new(
        command
            .clone()
            .name(name.to_owned())
            .disable_help_flag(false),
    )
    .title(name.to_uppercase())
    .manual("Firn");
    let mut text = Vec::new();
    man.render_title(&mut text)?;
    man.render_name_section(&mut text)?;
    man.render_synopsis_section(&mut text)?;
    man.render_description_section(&mut text)?;
    man.render_options_section(&mut text)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut text)?;
    }
    if command.get_after_help().is_some() {
        man.render_extra_section(&mut text)?;
    }
    let criu_family = matches!(name, "firn-dump" | "firn-restore");
    let status = match name.starts_with("firn-ploop") {
        true => PLOOP_STATUS,
        false => EXIT_STATUS,
    };
    text.write_all(status.as_bytes())?;
    if criu_family {
        text.write_all(FILES.as_bytes())?;
        text.write_all(ENVIRONMENT.as_bytes())?;
    }
    std::fs::write(dir.join(format!("{name}.1")), text)
}
