//! The catalogue of bugs that block replicators really shipped (S01-S46, U1-U11, with gaps), and where each
//! is told here. Every part of it is a file `tests/tests/shipped_bugs_*.rs` with a table; [`check`] holds a
//! table against the sources, so that no test is named that does not exist.
use std::path::Path;

/// Where a scenario is told.
#[derive(Clone, Copy, Debug)]
pub enum Told {
    /// By a test, `PATH::NAME`, the path from the root of the repository.
    By(&'static str),
    /// It cannot happen to two nodes in userspace, or not to this program: why.
    Never(&'static str),
}

/// Scenarios of one part, each with all the places where it is told.
pub type Table = &'static [(&'static str, &'static [Told])];

/// What is wrong with a table: tests that do not exist, scenarios that are missing or not in this part.
#[must_use]
pub fn check(part: &[&str], table: Table) -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut wrong = Vec::new();
    let named: Vec<&str> = table.iter().map(|(scenario, _)| *scenario).collect();
    if named != part {
        wrong.push(format!("the part is {part:?}, the table tells {named:?}"));
    }
    for (scenario, places) in table {
        if places.is_empty() {
            wrong.push(format!("{scenario} is told nowhere"));
        }
        for place in *places {
            match place {
                Told::Never(why) if why.len() < 40 => wrong.push(format!("{scenario}: no reason: {why}")),
                Told::Never(_) => {}
                Told::By(place) => {
                    if let Err(why) = exists(&root, place) {
                        wrong.push(format!("{scenario}: {place}: {why}"));
                    }
                }
            }
        }
    }
    wrong
}

fn exists(root: &Path, place: &str) -> Result<(), String> {
    let (path, name) = place.rsplit_once("::").ok_or("no path::name")?;
    let text = std::fs::read_to_string(root.join(path)).map_err(|error| error.to_string())?;
    // A test of a shell script is named by its step.
    let sought = if path.ends_with(".sh") { name.to_owned() } else { format!("fn {name}(") };
    if text.contains(&sought) { Ok(()) } else { Err("not in that file".into()) }
}
