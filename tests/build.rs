//! Lists the suites of scenarios, all of which `tests/planted.rs` takes in: a new one cannot be forgotten there.
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

/// Not scenarios: random runs, which `planted.rs` starts itself, and that file.
const NO_SUITES: [&str; 2] = ["sim_smoke", "planted"];

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=tests");
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    let mut files: Vec<PathBuf> =
        fs::read_dir(root.join("tests"))?.map(|file| Ok(file?.path())).collect::<io::Result<_>>()?;
    files.sort();
    let mut text = String::new();
    for file in files.iter().filter(|file| file.extension().is_some_and(|extension| extension == "rs")) {
        let name = file.file_stem().unwrap_or_default().to_string_lossy();
        if !NO_SUITES.contains(&&*name) {
            writeln!(text, "#[path = {:?}]\nmod {name};", Path::new(file)).map_err(io::Error::other)?;
        }
    }
    fs::write(out.join("suites.rs"), text)
}
