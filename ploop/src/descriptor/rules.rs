//! The rules of the tree, and the steps that change it.

use std::path::Path;

use super::{
    Descriptor, DescriptorError, Guid, ImageEntry, ImageType, MAX_IMAGES, Shot, Temporary,
};

impl Descriptor {
    /// Gives the top its constant GUID and holds everything against the rules.
    pub(super) fn settle(&mut self, top: Guid) -> Result<(), DescriptorError> {
        if top != Guid::TOP {
            if self.images.iter().any(|image| image.guid == Guid::TOP) {
                return Err(tree(format!(
                    "its top is {top}, and {} is another image",
                    Guid::TOP
                )));
            }
            self.rename(top, Guid::TOP);
        }
        self.check()
    }

    /// Holds the descriptor against the rules.
    ///
    /// # Errors
    /// Names the first rule that it breaks.
    pub fn check(&self) -> Result<(), DescriptorError> {
        let wrong = |element| Err(DescriptorError::Element { element });
        if self.blocksize_sectors == 0 || self.blocksize_sectors > 131_072 {
            return wrong("Blocksize");
        }
        if self.size_sectors == 0 || self.size_sectors > u64::MAX / 1024 {
            return wrong("Disk_size");
        }
        if self.images.is_empty() || self.images.len() > MAX_IMAGES + 1 {
            return Err(tree(format!("it has {} images", self.images.len())));
        }
        if self.images.len() != self.shots.len() {
            return Err(tree("it has not one shot for each image".to_owned()));
        }
        for image in &self.images {
            let same = |guid: Guid| guid == image.guid;
            let shots = self.shots.iter().filter(|shot| same(shot.guid)).count();
            let images = self.images.iter().filter(|other| same(other.guid)).count();
            if shots != 1 || images != 1 || same(Guid::NIL) {
                return Err(tree(format!(
                    "image {} has not exactly one shot",
                    image.guid
                )));
            }
        }
        for shot in &self.shots {
            self.ancestry(shot.guid)?;
        }
        let plain = |image: &&ImageEntry| image.kind == ImageType::Plain;
        for image in self.images.iter().filter(plain) {
            if self.shot(image.guid)?.parent != Guid::NIL {
                let what = format!("image {} is raw, and only a base can be", image.guid);
                return Err(tree(what));
            }
        }
        self.shot(Guid::TOP).map(|_| ())
    }

    /// The shots from the base up to one.
    fn ancestry(&self, guid: Guid) -> Result<Vec<Guid>, DescriptorError> {
        let mut line = vec![guid];
        let mut at = self.shot(guid)?.parent;
        while at != Guid::NIL {
            if line.contains(&at) {
                return Err(tree(format!("snapshot {at} descends from itself")));
            }
            line.push(at);
            at = self
                .shot(at)
                .map_err(|_| tree(format!("the parent {at} of a snapshot is missing")))?
                .parent;
        }
        line.reverse();
        Ok(line)
    }

    /// The shot of a GUID.
    ///
    /// # Errors
    /// There is none.
    pub fn shot(&self, guid: Guid) -> Result<&Shot, DescriptorError> {
        let mut shots = self.shots.iter();
        shots
            .find(|shot| shot.guid == guid)
            .ok_or(DescriptorError::NoSnapshot(guid))
    }

    /// The image of a GUID.
    ///
    /// # Errors
    /// There is none.
    pub fn image(&self, guid: Guid) -> Result<&ImageEntry, DescriptorError> {
        let mut images = self.images.iter();
        images
            .find(|image| image.guid == guid)
            .ok_or(DescriptorError::NoSnapshot(guid))
    }

    /// The images that a snapshot consists of, base first.
    ///
    /// # Errors
    /// There is no such snapshot.
    pub fn chain(&self, guid: Guid) -> Result<Vec<&ImageEntry>, DescriptorError> {
        let line = self.ancestry(guid)?;
        line.into_iter().map(|guid| self.image(guid)).collect()
    }

    /// The shots that descend directly from one.
    pub fn children(&self, guid: Guid) -> Vec<Guid> {
        let children = self.shots.iter().filter(|shot| shot.parent == guid);
        children.map(|shot| shot.guid).collect()
    }

    /// The base image.
    ///
    /// # Errors
    /// The tree has none.
    pub fn base(&self) -> Result<&ImageEntry, DescriptorError> {
        let chain = self.chain(Guid::TOP)?;
        chain
            .first()
            .copied()
            .ok_or(DescriptorError::NoSnapshot(Guid::TOP))
    }

    fn rename(&mut self, from: Guid, to: Guid) {
        let guids = self.images.iter_mut().map(|image| &mut image.guid);
        let shots = self.shots.iter_mut();
        let shots = shots.flat_map(|shot| [&mut shot.guid, &mut shot.parent]);
        for guid in guids.chain(shots).filter(|guid| **guid == from) {
            *guid = to;
        }
    }

    /// Makes the top a snapshot of this name, and puts a new file on it.
    ///
    /// # Errors
    /// The name is taken, or there is no room.
    pub fn add_snapshot(&mut self, id: Guid, file: &Path) -> Result<(), DescriptorError> {
        if self.images.len() >= MAX_IMAGES {
            return Err(DescriptorError::Full);
        }
        if id == Guid::NIL || self.shot(id).is_ok() {
            return Err(tree(format!("there is a snapshot {id} already")));
        }
        self.rename(Guid::TOP, id);
        self.put_top(id, file);
        Ok(())
    }

    /// Says whether a snapshot goes away by itself.
    ///
    /// # Errors
    /// There is no such snapshot.
    pub fn set_temporary(
        &mut self,
        id: Guid,
        temporary: Option<Temporary>,
    ) -> Result<(), DescriptorError> {
        let mut shots = self.shots.iter_mut();
        let shot = shots.find(|shot| shot.guid == id);
        shot.ok_or(DescriptorError::NoSnapshot(id))?.temporary = temporary;
        Ok(())
    }

    fn put_top(&mut self, parent: Guid, file: &Path) {
        self.images.push(ImageEntry {
            guid: Guid::TOP,
            kind: ImageType::Compressed,
            file: file.to_owned(),
        });
        self.shots.push(Shot {
            guid: Guid::TOP,
            parent,
            temporary: None,
        });
    }

    /// Puts a new file on a snapshot and makes it the top; the old top's image is given back.
    ///
    /// # Errors
    /// There is no such snapshot.
    pub fn switch(&mut self, id: Guid, file: &Path) -> Result<ImageEntry, DescriptorError> {
        if id == Guid::TOP {
            return Err(tree("the top is no snapshot".to_owned()));
        }
        self.shot(id)?;
        let old = self.remove_leaf(Guid::TOP)?;
        self.put_top(id, file);
        Ok(old)
    }

    /// Takes a snapshot without children away; its image is given back.
    ///
    /// # Errors
    /// There is none, or it has children.
    pub fn remove_leaf(&mut self, id: Guid) -> Result<ImageEntry, DescriptorError> {
        let image = self.image(id)?.clone();
        if !self.children(id).is_empty() {
            return Err(tree(format!("snapshot {id} has children")));
        }
        self.images.retain(|image| image.guid != id);
        self.shots.retain(|shot| shot.guid != id);
        Ok(image)
    }

    /// Says that the only child of a snapshot was merged into the snapshot's file; the child's old
    /// image is given back.
    ///
    /// # Errors
    /// There is no such snapshot, or it has not one child.
    pub fn merged(&mut self, id: Guid) -> Result<ImageEntry, DescriptorError> {
        let child = self.only_child(id)?;
        let parent = self.shot(id)?.parent;
        let lower = self.image(id)?.clone();
        let upper = self.image(child)?.clone();
        self.images.retain(|image| image.guid != child);
        self.shots.retain(|shot| shot.guid != id);
        for image in self.images.iter_mut().filter(|image| image.guid == id) {
            *image = ImageEntry {
                guid: child,
                ..lower.clone()
            };
        }
        for shot in self.shots.iter_mut().filter(|shot| shot.guid == child) {
            shot.parent = parent;
        }
        Ok(upper)
    }

    /// The one child of a snapshot.
    ///
    /// # Errors
    /// There is none, or there are several.
    pub fn only_child(&self, id: Guid) -> Result<Guid, DescriptorError> {
        self.shot(id)?;
        match self.children(id).as_slice() {
            [child] => Ok(*child),
            others => Err(tree(format!("snapshot {id} has {} children", others.len()))),
        }
    }
}

fn tree(what: String) -> DescriptorError {
    DescriptorError::Tree(what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk() -> Descriptor {
        Descriptor::new(204_800, 2048, ImageType::Compressed, Path::new("root.hds"))
    }

    fn guid(number: u8) -> Guid {
        Guid::from_bytes([number; 16])
    }

    #[test]
    fn a_descriptor_comes_back() {
        let mut disk = disk();
        disk.add_snapshot(guid(1), Path::new("root.hds.<&>"))
            .unwrap();
        disk.key_id = Some("a & b".to_owned());
        disk.preallocated = true;
        disk.volume = Some(super::super::Volume {
            parent: Some("/gold/DiskDescriptor.xml".into()),
            snapshot: Some(guid(9)),
            read_only: true,
        });
        assert_eq!(Descriptor::parse(&disk.to_xml()), Ok(disk));
    }

    #[test]
    fn snapshots_switches_and_merges_keep_the_tree() {
        let mut disk = disk();
        disk.add_snapshot(guid(1), Path::new("b")).unwrap();
        disk.add_snapshot(guid(2), Path::new("c")).unwrap();
        disk.switch(guid(1), Path::new("d")).unwrap();
        disk.check().unwrap();
        assert_eq!(disk.children(guid(1)), [guid(2), Guid::TOP]);
        let files: Vec<_> = disk
            .chain(Guid::TOP)
            .unwrap()
            .iter()
            .map(|i| i.file.clone())
            .collect();
        assert_eq!(files, [Path::new("root.hds"), Path::new("d")]);
        assert!(disk.merged(guid(1)).is_err(), "it has two children");
        assert!(disk.remove_leaf(guid(1)).is_err());
        assert_eq!(disk.remove_leaf(guid(2)).unwrap().file, Path::new("b"));
        assert_eq!(disk.merged(guid(1)).unwrap().file, Path::new("d"));
        disk.check().unwrap();
        assert_eq!(disk.images.len(), 1);
        assert_eq!(disk.base().unwrap().file, Path::new("root.hds"));
    }

    #[test]
    fn there_is_room_for_126_snapshots() {
        let mut disk = disk();
        for number in 1..=126 {
            disk.add_snapshot(guid(number), Path::new("x")).unwrap();
        }
        let more = disk.add_snapshot(guid(200), Path::new("x"));
        assert_eq!(more, Err(DescriptorError::Full));
        assert_eq!(Descriptor::parse(&disk.to_xml()), Ok(disk));
    }

    #[test]
    fn other_writers_are_understood() {
        let text = disk()
            .to_xml()
            .replace("Parallels_disk_image", "Virtuozzo_disk_image");
        let old_top = text.replace(
            "5fbaabe3-6958-40ff-92a7-860e329aab41",
            "0fbaabe3-6958-40ff-92a7-860e329aab41",
        );
        assert_eq!(Descriptor::parse(&old_top), Ok(disk()));
    }

    #[test]
    fn broken_trees_are_refused() {
        let mut two = disk();
        two.add_snapshot(guid(1), Path::new("b")).unwrap();
        let text = two.to_xml();
        let nil = Guid::NIL.to_string();
        let breaks = [
            text.replace(&nil, &guid(7).to_string()),
            text.replace(&nil, &guid(1).to_string()),
            text.replace("<Type>Compressed", "<Type>Squeezed"),
            text.replace("<Type>Compressed", "<Type>Plain"),
            text.replace("<Blocksize>2048", "<Blocksize>0"),
            text.replace("<Disk_size>204800", "<Disk_size>-1"),
            text.replace("<File>b</File>", ""),
            text.replace("</StorageData>", ""),
            text.replace("<GUID>", "<GUID>&lol;"),
            "<a>".repeat(1000),
            String::new(),
        ];
        for (at, text) in breaks.iter().enumerate() {
            assert!(Descriptor::parse(text).is_err(), "case {at}");
        }
    }
}
