//! Negative controls: cores with a planted defect, which random runs must notice.
use lockstep_replicator::core::fault::Fault;
use lockstep_tests::planted::by_seeds;

/// Noticed by few random runs. Of the other defects it is not known yet how many runs they take.
const SOON: [Fault; 18] = [
    Fault::SkipEpochFlush,
    Fault::BarrierAckEarly,
    Fault::CompleteAtReceive,
    Fault::DiscardNotMirrored,
    Fault::RequestsDoNotLock,
    Fault::PeerWritesDoNotLock,
    Fault::FlushSkipsDisk,
    Fault::NoMarkWithoutPeer,
    Fault::NoMarkAtLoss,
    Fault::NoteIgnored,
    Fault::BitmapReplaced,
    Fault::PagesBeforeData,
    Fault::AlNotAwaited,
    Fault::NoActivityLog,
    Fault::NoNewGeneration,
    Fault::NoPrimaryFlag,
    Fault::HotExtentsIgnored,
    Fault::TargetEndsEarly,
];

#[test]
fn random_runs_notice_planted_defects() {
    let missed: Vec<&str> =
        SOON.iter().filter(|fault| by_seeds(**fault, 1..=40).is_none()).map(|fault| fault.name()).collect();
    assert!(missed.is_empty(), "40 seeds do not notice {missed:?}");
}
