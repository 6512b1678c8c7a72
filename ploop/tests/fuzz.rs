//! Outside bytes: whatever stands in a header, a BAT, an extension, a descriptor or the stream of a copy,
//! opening, checking, mending and receiving answer, and what was mended keeps every rule.
//!
//! Inputs are valid files with a few fields and bytes changed. `FIRN_PLOOP_INPUTS=N` plays N of them
//! instead of a few; the same ones in every run.

use firn_ploop::copy::wire::{self, Encoder, Hello, Kind};
use firn_ploop::copy::{FileTarget, ReceiveOptions, TargetFormat, receive};
use firn_ploop::descriptor::{Descriptor, Guid, ImageType};
use firn_ploop::format::expanded::{
    ExpandedImage, Finding, Header, Mark, Repair, Severity, Unclosed, Version, check,
    parse_extension,
};
use firn_ploop::recorder::MemoryFile;
use firn_ploop::{Access, DirtyBitmap, Image, Slot};

/// xorshift: the same inputs in every run.
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 1).unwrap() % end
    }

    fn number(&mut self) -> u32 {
        let near = [
            0, 1, 2, 3, 4, 7, 8, 9, 20, 21, 63, 64, 127, 2047, 2048, 131_072, 131_073,
        ];
        let far = [
            u32::MAX,
            u32::MAX - 1,
            1 << 31,
            i32::MAX.unsigned_abs() / 4,
            0x746F_6E59,
            0x312E_3276,
        ];
        match self.below(3) {
            0 => near[self.below(near.len())],
            1 => far[self.below(far.len())],
            _ => u32::try_from(self.below(1 << 32)).unwrap(),
        }
    }
}

fn inputs(few: u64) -> u64 {
    let asked = std::env::var("FIRN_PLOOP_INPUTS").ok();
    asked.and_then(|text| text.parse().ok()).unwrap_or(few)
}

/// Images with clusters of one sector: small enough to play many.
fn seeds() -> Vec<Vec<u8>> {
    let mut header = Header::new(20 * 512, 512);
    header.flags = 0;
    let mut plain = header.encode().to_vec();
    plain.resize(6 * 512, 7);
    plain[64..512].fill(0);
    for (cluster, place) in [(0, 1u32), (3, 4), (7, 2), (19, 5)] {
        plain[64 + 4 * cluster..][..4].copy_from_slice(&place.to_le_bytes());
    }
    let mut old = header.clone();
    (old.version, old.data_start) = (Version::V1, 0);
    let mut v1 = plain.clone();
    v1[..64].copy_from_slice(&old.encode());
    let file = MemoryFile::of(plain.clone());
    let image =
        ExpandedImage::open(Box::new(file.clone()), Access::ReadWrite, Unclosed::Refuse).unwrap();
    let bitmap = DirtyBitmap::new([5; 16], image.size_bytes(), 512);
    bitmap.bits.set(700..5000);
    assert!(image.keep_bitmap(bitmap));
    image.close().unwrap();
    assert_eq!(
        check(&file, Repair::No).unwrap().header.mark,
        Mark::ClosedWithExtension
    );
    vec![plain, v1, file.bytes()]
}

fn change(bytes: &mut Vec<u8>, chance: &mut Chance) {
    for _ in 0..=chance.below(4) {
        match chance.below(12) {
            0..7 => {
                let field = 16 + 4 * chance.below(12 + 20);
                let value = chance.number();
                if let Some(four) = bytes.get_mut(field..field + 4) {
                    four.copy_from_slice(&value.to_le_bytes());
                }
            }
            7..10 => {
                let at = chance.below(bytes.len());
                bytes[at] ^= 1 << chance.below(8);
            }
            10 => bytes.resize(64 + chance.below(8 * 512), 9),
            _ => bytes.truncate(1 + chance.below(bytes.len()).max(600)),
        }
    }
}

#[test]
fn images_of_any_bytes_are_answered_and_mended() {
    let seeds = seeds();
    let mut chance = Chance(0x5EED_1234_5678_9ABC);
    let (mut opened, mut mended) = (0, 0);
    let count = inputs(4_000);
    for _ in 0..count {
        let mut bytes = seeds[chance.below(seeds.len())].clone();
        change(&mut bytes, &mut chance);
        opened += u64::from(reads(&bytes));
        // Writing makes the file grow by 8 MiB: not with each of them.
        let writes = chance.below(32) == 0;
        mended += u64::from(mends(bytes, writes));
    }
    assert!(
        opened * 20 > count && mended * 5 > count,
        "{opened} opened, {mended} mended"
    );
}

/// Opens an image and reads all of it.
fn reads(bytes: &[u8]) -> bool {
    let file = MemoryFile::of(bytes.to_vec());
    let Ok(image) = ExpandedImage::open(Box::new(file), Access::ReadOnly, Unclosed::Refuse) else {
        return false;
    };
    for cluster in 0..24 {
        if image.slot(cluster).unwrap() == Slot::Data {
            let mut buf = vec![0; usize::try_from(image.cluster_bytes()).unwrap().min(4096)];
            image.read(cluster, 0, &mut buf).unwrap();
        }
    }
    true
}

/// Mends an image; then no rule is broken any more, and it can be written.
fn mends(bytes: Vec<u8>, writes: bool) -> bool {
    let file = MemoryFile::of(bytes);
    let Ok(before) = check(&file, Repair::No) else {
        return false;
    };
    if u64::from(before.header.cluster_bytes()) > 1 << 16 {
        // A mended file is a whole number of clusters: up to 64 MiB of memory for each input.
        return false;
    }
    let Ok(after) = check(&file, Repair::Yes) else {
        return false;
    };
    let hopeless = |f: &Finding| matches!(f, Finding::Converting | Finding::Entries { .. });
    if after.left.iter().any(hopeless) {
        return false;
    }
    assert!(
        after.worst() <= Some(Severity::Note),
        "{before:?}\n{after:?}"
    );
    let boxed = Box::new(file.clone());
    match ExpandedImage::open(boxed, Access::ReadWrite, Unclosed::Refuse) {
        Ok(image) => {
            let last = image.size_bytes().div_ceil(image.cluster_bytes().into());
            let last = u32::try_from(last.saturating_sub(1)).unwrap();
            if writes && image.size_bytes() > 0 && image.slot(last).unwrap() == Slot::Absent {
                image.store(last, 0, &[1]).unwrap();
            }
            image.close().unwrap();
            let checked = check(&file, Repair::No).unwrap();
            assert!(checked.worst() <= Some(Severity::Note), "{checked:?}");
        }
        Err(error) => {
            let odd = !before.header.cluster_sectors.is_power_of_two();
            assert!(
                odd || before.header.version == Version::V1,
                "{error}: {after:?}"
            );
        }
    }
    true
}

#[test]
fn extensions_of_any_bytes_are_answered() {
    let seed = seeds().pop().unwrap();
    let cluster = seed[seed.len() - 512..].to_vec();
    let mut chance = Chance(77);
    assert!(!parse_extension(&cluster).unwrap().is_empty());
    for _ in 0..inputs(10_000) {
        let mut bytes = cluster.clone();
        for _ in 0..=chance.below(3) {
            let at = chance.below(bytes.len());
            bytes[at] = u8::try_from(chance.below(256)).unwrap();
        }
        assert!(bytes == cluster || parse_extension(&bytes).is_err());
    }
}

#[test]
fn descriptors_of_any_bytes_are_answered() {
    let mut disk = Descriptor::new(204_800, 2048, ImageType::Compressed, "root.hds".as_ref());
    for number in 1..4 {
        disk.add_snapshot(Guid::from_bytes([number; 16]), "root.hds.x".as_ref())
            .unwrap();
    }
    let seed = disk.to_xml();
    let words = [
        "<",
        ">",
        "/",
        "&",
        "&amp;",
        "&#0;",
        "<![CDATA[",
        "]]>",
        "<!--",
        "-->",
        "<Shot>",
        "</Shot>",
        "<Image>",
        "{",
        "}",
        "0",
        "99999999999999999999",
        "-1",
        "<!DOCTYPE a [<!ENTITY b \"c\">]>",
        "<?x?>",
        "ü",
    ];
    let mut chance = Chance(99);
    let mut good = 0;
    let count = inputs(10_000);
    for _ in 0..count {
        let mut text: Vec<char> = seed.chars().collect();
        for _ in 0..=chance.below(3) {
            let at = chance.below(text.len());
            match chance.below(3) {
                0 => {
                    text.splice(at..at, words[chance.below(words.len())].chars());
                }
                1 => {
                    let end = (at + chance.below(60)).min(text.len());
                    text.drain(at..end);
                }
                _ => {
                    let end = (at + chance.below(300)).min(text.len());
                    let copy: Vec<char> = text[at..end].to_vec();
                    text.splice(at..at, copy);
                }
            }
            if text.is_empty() {
                break;
            }
        }
        let text: String = text.into_iter().collect();
        if let Ok(descriptor) = Descriptor::parse(&text) {
            descriptor.check().unwrap();
            assert_eq!(Descriptor::parse(&descriptor.to_xml()), Ok(descriptor));
            good += 1;
        }
    }
    assert!(good * 50 > count, "{good} good ones");
}

/// First word of the original's packets.
const LEGACY_MAGIC: u32 = 0x4CC0_AC3D;
/// The largest disk that the streams' receiver takes.
const MAX_DISK: u64 = 4 << 20;

fn hello(chance: &mut Chance) -> Vec<u8> {
    let any = u64::from(chance.number());
    let hello = Hello {
        version: match chance.below(20) {
            0 => chance.number(),
            _ => wire::VERSION,
        },
        session: ["s", "", "../../x", "a-1", &"n".repeat(65)][chance.below(40).saturating_sub(35)]
            .to_owned(),
        size_bytes: [1 << 20, 100_000, any, any << 32, MAX_DISK + 1]
            [chance.below(12).saturating_sub(7)],
        unit_bytes: [1 << 16, 4096, 1 << 17, chance.number()][chance.below(10).saturating_sub(6)],
        hears: chance.below(2) == 0,
    };
    serde_json::to_vec(&hello).unwrap()
}

/// Packets that are well-formed each, in an order and at places that may be wrong.
fn stream(chance: &mut Chance) -> Vec<u8> {
    let level = (chance.below(2) == 0).then_some(1);
    let mut encoder = Encoder::new(level);
    let mut packets = vec![(Kind::Hello, 0, hello(chance))];
    for _ in 0..chance.below(5) {
        let offset = match chance.below(4) {
            0 => u64::from(chance.number()) << chance.below(33),
            _ => 4096 * chance.below(300) as u64,
        };
        let fill = u8::try_from(chance.below(3)).unwrap();
        packets.push(match chance.below(10) {
            0..5 => (Kind::Data, offset, vec![fill; chance.below(5000)]),
            5..8 => (
                Kind::Zero,
                offset,
                u64::from(chance.number()).to_le_bytes().to_vec(),
            ),
            8 => (Kind::Barrier, 0, vec![]),
            _ => (
                [Kind::Have, Kind::Ack, Kind::Failed, Kind::Hello][chance.below(4)],
                offset,
                vec![fill; 16],
            ),
        });
    }
    packets.push((Kind::End, 0, vec![]));
    if chance.below(10) == 0 {
        packets.remove(chance.below(packets.len()));
    }
    let encoded = packets
        .iter()
        .map(|(kind, at, payload)| encoder.encode(*kind, *at, payload).unwrap().0);
    encoded.flatten().collect()
}

fn legacy_stream(chance: &mut Chance) -> Vec<u8> {
    let mut out = Vec::new();
    for _ in 0..chance.below(4) {
        let payload = vec![3; [4, 512, 0, 5000][chance.below(4)]];
        let place = match chance.below(3) {
            0 => u64::from(chance.number()) << chance.below(33),
            _ => 512 * chance.below(20) as u64,
        };
        out.extend(LEGACY_MAGIC.to_le_bytes());
        out.extend(u32::try_from(payload.len()).unwrap().to_le_bytes());
        out.extend(place.to_le_bytes());
        out.extend(payload);
    }
    out.extend(LEGACY_MAGIC.to_le_bytes());
    out.extend([0; 12]);
    out
}

fn change_stream(bytes: &mut Vec<u8>, chance: &mut Chance) {
    for _ in 0..=chance.below(2) {
        let at = chance.below(bytes.len());
        match chance.below(4) {
            0 => bytes.truncate(at.max(1)),
            1 => {
                let value = chance.number();
                if let Some(four) = bytes.get_mut(at..at + 4) {
                    four.copy_from_slice(&value.to_le_bytes());
                }
            }
            _ => bytes[at] ^= 1 << chance.below(8),
        }
    }
}

#[test]
fn streams_of_any_bytes_are_answered() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("copy");
    let mut chance = Chance(0xC0_FFEE);
    let (mut whole, count) = (0, inputs(2_000));
    for _ in 0..count {
        let mut bytes = match chance.below(4) {
            0 => legacy_stream(&mut chance),
            _ => stream(&mut chance),
        };
        if chance.below(2) == 0 {
            change_stream(&mut bytes, &mut chance);
        }
        let format = [TargetFormat::Raw, TargetFormat::Expanded][chance.below(2)];
        let target = FileTarget::new(&path, format, MAX_DISK);
        let options = ReceiveOptions { max_size: MAX_DISK };
        let mut answers = Vec::new();
        let received = receive(
            &mut &bytes[..],
            Some(&mut answers),
            target,
            &options,
            &mut |_| {},
        );
        // Under its name it is there exactly when the stream was whole, and never larger than it may be.
        assert_eq!(path.exists(), received.is_ok(), "{received:?}");
        if received.is_ok() {
            whole += 1;
            assert!(path.metadata().unwrap().len() <= 2 * MAX_DISK);
        }
        for entry in std::fs::read_dir(dir.path()).unwrap() {
            let file = entry.unwrap().path();
            let name = file.file_name().unwrap().to_str().unwrap();
            assert!(
                ["copy", "copy.partial", "copy.partial.map"].contains(&name),
                "{name}"
            );
            std::fs::remove_file(file).unwrap();
        }
    }
    assert!(whole * 20 > count, "{whole} whole ones");
}
