//! Shows that the suite notices a wrong core: runs it with one planted defect until something is caught.
//!
//! A random run or a scenario may be what notices. A scenario is run in a process of its own with
//! [`VARIABLE`] set, which gives every world of that process the defect. What noticed each defect stands in
//! `docs/planted-faults.md`, which [`report`] writes and [`known`] reads.
use crate::sim::{plan, run_plan};
use lockstep_replicator::core::fault::Fault;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Names the defect that every [`crate::sim::Options`] of this process begins with.
pub const VARIABLE: &str = "LOCKSTEP_PLANTED";

/// What noticed a defect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum By {
    /// The random run of this seed.
    Seed(u64),
    /// This scenario, `suite::name`.
    Scenario(String),
}

/// How a defect was caught.
#[derive(Clone, Debug)]
pub struct Caught {
    /// What noticed it.
    pub by: By,
    /// Random runs needed, the one that noticed it included; all of them, if none did.
    pub runs: u64,
    /// What was noticed, one line.
    pub how: String,
}

/// The defect that [`VARIABLE`] asks for.
///
/// # Panics
/// There is no defect of that name.
#[must_use]
pub fn from_environment() -> Option<Fault> {
    let name = std::env::var(VARIABLE).ok()?;
    let known = Fault::ALL.iter().find(|fault| fault.name() == name);
    Some(*known.unwrap_or_else(|| panic!("{VARIABLE}: no defect is called {name:?}")))
}

/// What the random run of `seed` says about a core with this defect.
#[must_use]
pub fn by_seed(fault: Fault, seed: u64) -> Option<Caught> {
    let mut plan = plan::draw(seed);
    plan.options.planted = Some(fault);
    let how = caught(|| run_plan(&plan).map(|_| ()))?;
    Some(Caught { by: By::Seed(seed), runs: 1, how })
}

/// The first of `seeds` whose random run notices the defect.
#[must_use]
pub fn by_seeds(fault: Fault, seeds: std::ops::RangeInclusive<u64>) -> Option<Caught> {
    (1..).zip(seeds).find_map(|(runs, seed)| Some(Caught { runs, ..by_seed(fault, seed)? }))
}

/// What was noticed: an oracle's text or an assertion of the core.
pub fn caught(run: impl FnOnce() -> Result<(), String>) -> Option<String> {
    let text = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(())) => return None,
        Ok(Err(why)) => why,
        Err(panic) => {
            let text = panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            format!("assertion: {}", text.unwrap_or_default())
        }
    };
    Some(text.split('\n').next().unwrap_or_default().chars().take(150).collect())
}

/// `docs/planted-faults.md`: one row a defect, which [`known`] reads again.
#[must_use]
pub fn report(found: &[(Fault, Option<Caught>)], seeds: u64) -> String {
    let by_seed = |caught: &Option<Caught>| matches!(caught, Some(Caught { by: By::Seed(_), .. }));
    let seen = found.iter().filter(|(_, caught)| by_seed(caught)).count();
    let missed = found.iter().filter(|(_, caught)| caught.is_none()).count();
    let mut text = format!(
        "# Planted defects, and what notices them\n\n\
         Written by `.ci/planted find` (seeds 1 to {seeds}, then the scenarios); `.ci/planted check` demands it of \
         every commit.\n\n\
         {} defects: {seen} noticed by random runs, {} by scenarios, {missed} by nothing.\n\n\
         | defect | what is wrong | noticed by | random runs | what was seen |\n|---|---|---|---|---|\n",
        found.len(),
        found.len() - seen - missed,
    );
    for (fault, caught) in found {
        let (by, runs, how) = match caught {
            Some(Caught { by: By::Seed(seed), runs, how }) => {
                (format!("seed {seed}"), runs.to_string(), &**how)
            }
            Some(Caught { by: By::Scenario(name), runs, how }) => {
                (format!("scenario {name}"), format!("none of {runs}"), &**how)
            }
            None => ("NOTHING".to_owned(), format!("none of {seeds}"), ""),
        };
        let how = how.replace('|', "/").replace('`', "'");
        let what = fault.what().trim();
        text += &format!("| `{}` | {what} | {by} | {runs} | {} |\n", fault.name(), how.trim());
    }
    text
}

/// What the report says noticed each defect, by name, and the random runs that were tried.
#[must_use]
pub fn known(report: &str) -> BTreeMap<String, (By, u64)> {
    let rows = report.lines().filter(|line| line.starts_with("| `"));
    rows.filter_map(|row| {
        let mut cells = row.split('|').map(str::trim).skip(1);
        let name = cells.next()?.trim_matches('`').to_owned();
        let by = cells.nth(1)?;
        let runs = cells.next()?.split(' ').next_back()?.parse().ok()?;
        let by = match by.split_once(' ')? {
            ("seed", seed) => By::Seed(seed.parse().ok()?),
            ("scenario", name) => By::Scenario(name.to_owned()),
            _ => return None,
        };
        Some((name, (by, runs)))
    })
    .collect()
}

/// The defects of which the report says that nothing notices them.
#[must_use]
pub fn nothing_notices(report: &str) -> Vec<&str> {
    let rows = report.lines().filter(|line| line.starts_with("| `") && line.contains("| NOTHING |"));
    rows.filter_map(|row| row.split('`').nth(1)).collect()
}
