//! Finding a served disk by whatever the user has in hand.

use std::io;
use std::path::Path;

use super::config::Source;
use super::registry::{Record, Registry};
use crate::descriptor;

impl Registry {
    /// The served disk that a path names: its descriptor or the directory of that, its image, the
    /// device, or the directory where it is mounted. A snapshot is found by its device or mount.
    ///
    /// # Errors
    /// The registry can't be read.
    pub fn find_by(&self, path: &Path) -> io::Result<Option<Record>> {
        let wanted = std::path::absolute(path)?;
        let real = std::fs::canonicalize(&wanted).unwrap_or_else(|_| wanted.clone());
        let is = |known: &Path| known == wanted || known == real;
        let records = self.list()?;
        let by_view = records.iter().find(|record| {
            let views = [&record.device, &record.mountpoint];
            views.into_iter().flatten().any(|known| is(known))
        });
        if let Some(record) = by_view {
            return Ok(Some(record.clone()));
        }
        let xml = real.join(descriptor::FILE_NAME);
        let by_source = records.into_iter().find(|record| match &record.source {
            Source::Descriptor {
                path,
                snapshot: None,
            } => is(path) || *path == xml,
            Source::Descriptor { .. } => false,
            Source::File { path, .. } => is(path),
        });
        Ok(by_source)
    }
}
