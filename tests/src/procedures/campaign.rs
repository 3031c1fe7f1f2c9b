//! Every interruption of many procedures: what the generators of message cuts and of metadata cuts share.
use super::judge::{Interruption, Tally};
use super::{Procedure, everyday, resizes, split_brains};

/// The seed of all runs: `LOCKSTEP_CUT_SEED`, or 1.
#[must_use]
pub fn seed() -> u64 {
    std::env::var("LOCKSTEP_CUT_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1)
}

/// Those of a list.
#[must_use]
pub fn of(procedures: Vec<Procedure>, wanted: impl Fn(&Procedure) -> bool) -> Vec<Procedure> {
    procedures.into_iter().filter(wanted).collect()
}

/// What came of many interruptions.
#[derive(Debug, Default)]
pub struct Campaign {
    hits: u64,
    splits: u64,
    wrong: Vec<String>,
}

impl Campaign {
    /// The procedure undisturbed: what there is to interrupt.
    pub fn whole(&mut self, procedure: &Procedure) -> Tally {
        procedure.run(seed(), Interruption::None).unwrap_or_else(|why| {
            self.wrong.push(why);
            Tally::default()
        })
    }

    /// One interruption. Nothing random happens before it, so it must come as it came in the undisturbed run.
    pub fn interrupt(&mut self, procedure: &Procedure, interruption: Interruption) {
        match procedure.run(seed(), interruption) {
            Ok(tally) if tally.hit => {
                self.hits += 1;
                self.splits += u64::from(tally.split);
            }
            Ok(_) => self.wrong.push(format!("{}: it never came to {interruption:?}", procedure.name)),
            Err(why) => self.wrong.push(why),
        }
    }

    /// Nothing went wrong, and there were more than so many interruptions.
    ///
    /// # Panics
    /// With the first dozen of what went wrong.
    #[allow(clippy::print_stdout, reason = "says how much was tried")]
    pub fn judge(self, least: u64) {
        let Self { hits, splits, wrong } = self;
        println!("{hits} interruptions, {splits} split brains");
        let some: Vec<_> = wrong.iter().take(12).map(String::as_str).collect();
        assert!(wrong.is_empty(), "{} beside {hits} that went well:\n{}", wrong.len(), some.join("\n"));
        assert!(hits > least, "only {hits} interruptions");
    }
}

/// The one interruption that a variable names as `PROCEDURE,PART,PART,...`, told in full with `SIM_VERBOSE=1`.
///
/// # Panics
/// The variable names no procedure, or has too few parts.
#[allow(clippy::print_stdout, reason = "tells the one case that was asked for, or why it skips")]
pub fn one<const N: usize>(variable: &str, shape: &str, interruption: impl Fn([&str; N]) -> Interruption) {
    let Ok(wanted) = std::env::var(variable) else {
        println!("skipped: {variable} names nothing to try ({shape})");
        return;
    };
    let mut parts: Vec<&str> = wanted.rsplitn(N + 1, ',').collect();
    parts.reverse();
    let (name, parts) = parts.split_first().expect("a name");
    let parts: [&str; N] = parts.try_into().expect(shape);
    let all = [everyday(), resizes(), split_brains()].concat();
    let procedure = all.iter().find(|procedure| procedure.name == *name).expect("a procedure of this name");
    println!("{:?}", procedure.run(seed(), interruption(parts)));
}
