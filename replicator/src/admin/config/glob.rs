//! File name patterns of `include`: `*`, `?` and `[...]`, in any component of the path.
use std::path::{Component, Path, PathBuf};

/// Matches kept at most.
const MATCHES_MAX: usize = 10_000;

/// Existing files that match, sorted; a pattern without wildcards is returned as it is.
pub(crate) fn expand(base: &Path, pattern: &str) -> Vec<PathBuf> {
    let mut found =
        vec![if Path::new(pattern).is_absolute() { PathBuf::from("/") } else { base.to_path_buf() }];
    for part in Path::new(pattern).components() {
        let Component::Normal(name) = part else {
            if part == Component::ParentDir {
                found.iter_mut().for_each(|p| p.push(".."));
            }
            continue;
        };
        let name = name.to_string_lossy();
        if !name.contains(['*', '?', '[']) {
            found.iter_mut().for_each(|p| p.push(&*name));
            continue;
        }
        let mut next = Vec::new();
        for directory in found {
            let shown = if directory.as_os_str().is_empty() { Path::new(".") } else { &directory };
            let Ok(entries) = std::fs::read_dir(shown) else { continue };
            for entry in entries.flatten() {
                let file = entry.file_name();
                // A leading dot has to be written, as in the shell.
                let hidden = file.to_string_lossy().starts_with('.') && !name.starts_with('.');
                if !hidden
                    && matches(name.as_bytes(), file.to_string_lossy().as_bytes())
                    && next.len() < MATCHES_MAX
                {
                    next.push(directory.join(file));
                }
            }
        }
        next.retain(|p| p.exists());
        next.sort();
        found = next;
    }
    found
}

/// Whether a name matches; linear in the product of the lengths, whatever the stars.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n) = (0, 0);
    // Where to go back to: behind the last star, and one further in the name.
    let mut back: Option<(usize, usize)> = None;
    while n < name.len() {
        if pattern.get(p) == Some(&b'*') {
            back = Some((p + 1, n));
            p += 1;
        } else if let Some(len) = pattern.get(p..).and_then(|rest| one(rest, name[n])) {
            p += len;
            n += 1;
        } else if let Some((star, at)) = back {
            (p, n) = (star, at + 1);
            back = Some((star, at + 1));
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|b| *b == b'*')
}

/// Length of the pattern's first element when it takes `byte`.
fn one(pattern: &[u8], byte: u8) -> Option<usize> {
    match *pattern.first()? {
        b'?' => Some(1),
        b'[' => {
            let negated = matches!(pattern.get(1), Some(b'!' | b'^'));
            let start = if negated { 2 } else { 1 };
            let end = start + 1 + pattern.get(start + 1..)?.iter().position(|b| *b == b']')?;
            let set = &pattern[start..end];
            let hit =
                set.contains(&byte) || set.windows(3).any(|w| w[1] == b'-' && (w[0]..=w[2]).contains(&byte));
            (hit != negated).then_some(end + 1)
        }
        b if b == byte => Some(1),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_like_the_shells() {
        for (pattern, name, yes) in [
            ("*.res", "a.res", true),
            ("*.res", "a.res.bak", false),
            ("r?.res", "r1.res", true),
            ("[a-c]*", "bx", true),
            ("[!a-c]*", "bx", false),
            ("**a*", "xxa", true),
            ("[", "[", false),
        ] {
            assert_eq!(matches(pattern.as_bytes(), name.as_bytes()), yes, "{pattern} {name}");
        }
    }
}
