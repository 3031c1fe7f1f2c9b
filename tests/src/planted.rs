//! Shows that the suite notices a wrong core: runs it with one planted defect until something is caught.
use crate::sim::{plan, run_plan};
use lockstep_replicator::core::fault::Fault;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// How a defect was caught.
#[derive(Clone, Debug)]
pub struct Caught {
    /// The seed whose run went wrong.
    pub seed: u64,
    /// Runs needed, this one included.
    pub runs: u64,
    /// What was noticed, one line.
    pub how: String,
}

/// The first of `seeds` whose random run notices the defect.
#[must_use]
pub fn by_seeds(fault: Fault, seeds: std::ops::RangeInclusive<u64>) -> Option<Caught> {
    for (runs, seed) in (1..).zip(seeds) {
        let mut plan = plan::draw(seed);
        plan.options.planted = Some(fault);
        if let Some(how) = caught(|| run_plan(&plan).map(|_| ())) {
            return Some(Caught { seed, runs, how });
        }
    }
    None
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
