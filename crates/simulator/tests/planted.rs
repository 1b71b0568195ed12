//! The checkers are proved by bugs that are put back: each must be found within [`SEEDS`] seeds.

use simulator::{Options, Sabotage, run, run_many};

/// Most that a bug may take.
const SEEDS: u64 = 1_000;

/// Finds the bug; gives the invariant that it violates.
fn found(sabotage: Sabotage) -> &'static str {
    let options = Options { sabotage: Some(sabotage), ..Options::default() };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let (progress, violated) = run_many(0, SEEDS, threads, &options, |_| {});
    let Some(outcome) = violated else { panic!("{sabotage} is not found in {} seeds", progress.seeds) };
    let clean = run(outcome.seed, &Options::default());
    assert_eq!(clean.violation, None, "seed {:#x} without {sabotage}", outcome.seed);
    assert!(!outcome.trace.is_empty());
    outcome.violation.map_or("", |violation| violation.invariant)
}

#[test]
fn equal_weights_instead_of_tokens() {
    assert_eq!(found(Sabotage::EqualWeights), "I1 equal state");
}

#[test]
fn forgotten_fencing() {
    assert_eq!(found(Sabotage::ForgottenFencing), "I3 one commit");
}

#[test]
fn a_lease_handed_out_twice() {
    assert_eq!(found(Sabotage::LeaseTwice), "I2 ledger");
}

#[test]
fn a_newcomer_without_the_outer_momentum() {
    assert_eq!(found(Sabotage::MomentumMissing), "I1 equal state");
}

#[test]
fn a_commit_sent_before_the_log_is_synced() {
    assert_eq!(found(Sabotage::WriteBehind), "I3 one commit");
}
