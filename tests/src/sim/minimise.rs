//! Makes a failing plan smaller: leaves out chunks of its actions for as long as it fails in the same way.
use super::plan::Plan;
use super::run_plan;

/// What kind of failure a text tells, without its numbers.
#[must_use]
pub fn kind(why: &str) -> String {
    let text = why.split_once(": ").map_or(why, |(_, rest)| rest);
    let line = text.lines().next().unwrap_or("");
    let letters: String = line.chars().filter(|c| !c.is_ascii_digit()).collect();
    letters.chars().take(50).collect()
}

/// The smallest plan found that fails like this one, with its failure; `None` if it does not fail.
/// `tries` bounds the runs, `note` hears of progress.
pub fn minimise(plan: &Plan, tries: usize, mut note: impl FnMut(usize)) -> Option<(Plan, String)> {
    let mut why = run_plan(plan).err()?;
    let wanted = kind(&why);
    let mut best = plan.clone();
    let mut left = tries;
    let mut chunk = best.steps.len().div_ceil(2).max(1);
    loop {
        let mut from = 0;
        let mut shrunk = false;
        // From the end: what came after the failure goes first.
        while from < best.steps.len() && left > 0 {
            let end = best.steps.len() - from;
            let start = end.saturating_sub(chunk);
            let mut candidate = best.clone();
            candidate.steps.drain(start..end);
            left -= 1;
            match run_plan(&candidate) {
                Err(text) if kind(&text) == wanted => {
                    best = candidate;
                    why = text;
                    shrunk = true;
                    note(best.steps.len());
                }
                _ => from += chunk,
            }
        }
        if left == 0 || (chunk == 1 && !shrunk) {
            return Some((best, why));
        }
        if !shrunk || chunk > best.steps.len() {
            chunk = (chunk / 2).max(1);
        }
    }
}
