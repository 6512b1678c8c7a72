//! Patterns in which `*` stands for any text, also an empty one and one with slashes.

/// Whether a text is what a pattern describes.
pub(super) fn fits(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else {
        return false;
    };
    let parts: Vec<&str> = parts.collect();
    let Some((last, middle)) = parts.split_last() else {
        return rest.is_empty();
    };
    for part in middle {
        match rest.split_once(part) {
            Some((_, after)) => rest = after,
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_is_any_text() {
        for (pattern, text) in [
            ("/var/log/*", "/var/log/app/a.log"),
            ("*.log", "/var/log/a.log"),
            ("/a*b*c", "/abc"),
            ("*", ""),
            ("/x", "/x"),
        ] {
            assert!(fits(pattern, text), "{pattern} {text}");
        }
        for (pattern, text) in [
            ("/var/log/*", "/var/lo"),
            ("*.log", "/a.log.1"),
            ("/x", "/xy"),
        ] {
            assert!(!fits(pattern, text), "{pattern} {text}");
        }
    }
}
