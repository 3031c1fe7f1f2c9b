//! A real ext4 filesystem with real files of this machine, made and checked by e2fsprogs.
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Files taken at most, and how much of the image they may fill.
const MAX_FILES: u64 = 1500;
const FILL: u64 = 2;

fn tool(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    folders.map(|folder| folder.join(name)).find(|candidate| candidate.is_file())
}

/// Makes `image` of `bytes` bytes; how many files and bytes are in it, or `None` without mke2fs.
pub(crate) fn make_image(dir: &Path, image: &Path, bytes: u64) -> Result<Option<(u64, u64)>, Box<dyn Error>> {
    let Some(mke2fs) = tool("mke2fs") else { return Ok(None) };
    let tree = dir.join("tree");
    let mut taken = (0, 0);
    for source in ["/usr/share/zoneinfo", "/usr/share/perl", "/usr/share/doc", "/etc"] {
        let name = source.trim_start_matches('/').replace('/', "-");
        copy(Path::new(source), &tree.join(name), bytes / FILL, &mut taken);
    }
    let made = Command::new(mke2fs)
        .args(["-q", "-F", "-t", "ext4", "-d"])
        .arg(&tree)
        .arg(image)
        .arg(format!("{}k", bytes / 1024))
        .stdin(Stdio::null())
        .output()?;
    fs::remove_dir_all(&tree)?;
    if made.status.success() {
        Ok(Some(taken))
    } else {
        Err(format!("mke2fs: {}", String::from_utf8_lossy(&made.stderr)).into())
    }
}

/// Copies readable regular files until enough were taken.
fn copy(from: &Path, to: &Path, most: u64, taken: &mut (u64, u64)) {
    let Ok(entries) = fs::read_dir(from) else { return };
    let mut entries: Vec<_> = entries.flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let Ok(meta) = entry.metadata() else { continue };
        let target = to.join(entry.file_name());
        if meta.is_dir() {
            copy(&entry.path(), &target, most, taken);
        } else if meta.is_file() && taken.0 < MAX_FILES && taken.1 + meta.len() < most {
            let copied = fs::create_dir_all(to).and_then(|()| fs::copy(entry.path(), &target));
            if copied.is_ok() {
                taken.0 += 1;
                taken.1 += meta.len();
            }
        }
    }
}

/// What e2fsck says of the image.
pub(crate) fn check_image(image: &Path) -> Result<String, Box<dyn Error>> {
    let Some(e2fsck) = tool("e2fsck") else { return Ok("no e2fsck here to check it".into()) };
    let output = Command::new(e2fsck).args(["-f", "-n"]).arg(image).stdin(Stdio::null()).output()?;
    if output.status.success() {
        Ok("e2fsck finds it clean".into())
    } else {
        Err(format!("e2fsck: {}", String::from_utf8_lossy(&output.stdout)).into())
    }
}
