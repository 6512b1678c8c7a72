//! What kinds of image files there are, and what each one looks like.
//!
//! File names are `prefix`, a number, `suffix`; the number is an id whose meaning depends on the
//! kind (a pid, a namespace id, ...) and is ignored by kinds without one.

mod table;

pub use table::ImageKind;
use table::TABLE;

/// What a kind of image file looks like.
#[derive(Debug, Clone, Copy)]
pub struct KindInfo {
    /// The kind described.
    pub kind: ImageKind,
    /// CRIU's name for it.
    pub tag: &'static str,
    /// File name before the number.
    pub prefix: &'static str,
    /// How the number in the file name is written.
    pub number: Number,
    /// File name after the number.
    pub suffix: &'static str,
    /// When a set has such a file.
    pub presence: Presence,
    /// How the file begins.
    pub header: Header,
    /// Type magic; 0 for raw files.
    pub magic: u32,
    /// Value of `magic` in the JSON of crit, where crit knows the kind by its magic.
    pub crit_name: Option<&'static str>,
    /// How many entries there are.
    pub entries: Entries,
    /// Messages of the entries: all alike, or the first one and the rest.
    pub messages: &'static [&'static str],
    /// What stands between the entries.
    pub payload: Payload,
}

/// How the number in a file name is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Number {
    /// The name has no number.
    Unnumbered,
    /// Decimal digits.
    Decimal,
    /// Lower-case hexadecimal digits.
    Hexadecimal,
}

/// When a set has a file of a kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// In every set.
    Always,
    /// Where there is something to say.
    WhenNeeded,
    /// Only in sets of old CRIU releases, which are read but not written.
    LegacyRead,
    /// In sets older than any that is read.
    Unused,
}

/// How a file begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Header {
    /// No header: the file belongs to another format.
    Raw,
    /// The type magic alone (the inventory).
    Bare,
    /// The magic of ordinary images, then the type magic.
    Common,
    /// The magic of service images, then the type magic.
    Service,
}

/// How many entries a file has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entries {
    /// The file has no entries.
    Opaque,
    /// Exactly one, perhaps followed by payload.
    One,
    /// Any number of the same message.
    Many,
    /// One of the first message, then any number of the second.
    HeadThenMany,
}

/// What stands after an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Payload {
    /// Nothing.
    Nothing,
    /// As many bytes as these fields of the message say, one field after the other.
    Lengths(&'static [&'static str]),
    /// The segment, rounded up to 4 bytes; nothing where `in_pagemaps` is true.
    IpcShm,
    /// `qnum` times an `ipc_msg` entry and its text, rounded up to 8 bytes.
    IpcMsg,
    /// `nsems` 16-bit values, rounded up to 8 bytes.
    IpcSem,
    /// Where `chunks` is true, `ghost_chunk_entry` entries with `len` bytes after each; else
    /// everything up to the end of the file.
    Ghost,
}

impl ImageKind {
    /// Lists all kinds.
    pub fn all() -> impl Iterator<Item = ImageKind> {
        TABLE.iter().map(|row| row.kind)
    }

    /// Describes the kind.
    pub fn info(self) -> &'static KindInfo {
        &TABLE[self as usize]
    }

    /// Names the file of this kind and number; the number is ignored where the name has none.
    pub fn file_name(self, id: u64) -> String {
        let row = self.info();
        match row.number {
            Number::Unnumbered => format!("{}{}", row.prefix, row.suffix),
            Number::Decimal => format!("{}{id}{}", row.prefix, row.suffix),
            Number::Hexadecimal => format!("{}{id:x}{}", row.prefix, row.suffix),
        }
    }

    /// Recognises a file by its name; the number is 0 where the name has none.
    pub fn of_file_name(name: &str) -> Option<(ImageKind, u64)> {
        TABLE
            .iter()
            .find_map(|row| Some((row.kind, row.number_in(name)?)))
    }

    /// Recognises a file by its type magic.
    ///
    /// Where kinds share a magic (pagemaps of processes and of shared memory), the first one of
    /// the table that is still written is given; the name tells more.
    pub fn of_magic(magic: u32) -> Option<ImageKind> {
        let rows = || {
            TABLE
                .iter()
                .filter(|row| row.header != Header::Raw && row.magic == magic)
        };
        let written =
            |row: &&KindInfo| matches!(row.presence, Presence::Always | Presence::WhenNeeded);
        rows()
            .find(written)
            .or_else(|| rows().next())
            .map(|row| row.kind)
    }

    /// Recognises a file by its name in crit's JSON, as [`of_magic`](Self::of_magic) does by magic.
    pub fn of_crit_name(name: &str) -> Option<ImageKind> {
        let row = TABLE.iter().find(|row| row.crit_name == Some(name))?;
        ImageKind::of_magic(row.magic)
    }
}

impl KindInfo {
    /// Reads the number out of a file name of this kind.
    fn number_in(&self, name: &str) -> Option<u64> {
        let digits = name.strip_prefix(self.prefix)?.strip_suffix(self.suffix)?;
        let number = match self.number {
            Number::Unnumbered => return digits.is_empty().then_some(0),
            Number::Decimal => digits.parse().ok()?,
            Number::Hexadecimal => u64::from_str_radix(digits, 16).ok()?,
        };
        // One spelling per number: no sign, no leading zero, no capital letter.
        (self.kind.file_name(number) == name).then_some(number)
    }

    /// Says whether entries of this kind may be of the message.
    pub fn has_message(&self, message: &str) -> bool {
        let inner = match self.payload {
            Payload::IpcMsg => "ipc_msg",
            _ => "",
        };
        self.messages.contains(&message) || (message == inner && !inner.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_to_their_kind() {
        for kind in ImageKind::all() {
            let id = match kind.info().number {
                Number::Unnumbered => 0,
                _ => 43,
            };
            let expected = match kind {
                // The two share a name; the modern one wins.
                ImageKind::PagesOld => ImageKind::Pages,
                kind => kind,
            };
            assert_eq!(
                ImageKind::of_file_name(&kind.file_name(id)),
                Some((expected, id))
            );
        }
    }

    #[test]
    fn names_have_one_spelling() {
        for name in [
            "core-.img",
            "core-01.img",
            "core-+1.img",
            "ghost-file-A.img",
            "core-1",
            "x",
        ] {
            assert_eq!(ImageKind::of_file_name(name), None, "{name}");
        }
        assert_eq!(
            ImageKind::of_file_name("ghost-file-1f.img"),
            Some((ImageKind::GhostFile, 31))
        );
        let shmem = ImageKind::of_file_name("pagemap-shmem-7.img");
        assert_eq!(shmem, Some((ImageKind::ShmemPagemap, 7)));
    }

    #[test]
    fn shared_magics_give_the_written_kind() {
        assert_eq!(ImageKind::of_magic(0x5608_4025), Some(ImageKind::Pagemap));
        assert_eq!(
            ImageKind::of_magic(0x6734_3323),
            Some(ImageKind::BinfmtMisc)
        );
        assert_eq!(ImageKind::of_magic(0), None);
    }
}
