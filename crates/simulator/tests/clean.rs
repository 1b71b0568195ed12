//! Seeds without a violated invariant, and the same seed twice.

use simulator::{Options, run, run_many};

/// Simulated by each run of the tests; CI and people simulate more, with fresh seeds.
const SEEDS: u64 = 240;

#[test]
fn no_invariant_is_violated() {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let (progress, violated) = run_many(0, SEEDS, threads, &Options::default(), |_| {});
    if let Some(outcome) = violated {
        panic!("seed {:#x}: {:?}\n{}", outcome.seed, outcome.violation, outcome.trace.join("\n"));
    }
    assert_eq!(progress.seeds, SEEDS);
    assert!(progress.faults > 5 * SEEDS && progress.commits > 10 * SEEDS, "too little happened: {progress:?}");
}

#[test]
fn a_seed_gives_the_same_run_again() {
    for seed in [3, 0xBE51_6E61] {
        let options = Options::default();
        assert_eq!(run(seed, &options), run(seed, &options));
    }
}

#[test]
fn a_run_without_faults_does_every_step() {
    for seed in 0..8 {
        let outcome = run(seed, &Options { faults: false, ..Options::default() });
        assert_eq!((outcome.violation, outcome.faults), (None, 0), "seed {seed}");
        assert!(outcome.commits >= 4, "seed {seed}: {} commits", outcome.commits);
    }
}

/// docs/simulator.md tells what each has shown. Those of the first list did when sites ended with their coordinator and rounds were a mesh.
#[test]
fn seeds_that_showed_a_fault_of_what_ships_show_none() {
    let before = Options { sites_call: Some(false), sharded: Some(false), ..Options::default() };
    let shown = [42, 507, 743, 855, 986, 5_000_405, 7_000_232, 0x322c_ef97_4379_3642].map(|seed| (seed, &before));
    let now = Options::default();
    let later = [100_000_487, 100_000_766, 200_001_961, 310_001_339].map(|seed| (seed, &now));
    for (seed, options) in shown.into_iter().chain(later) {
        let outcome = run(seed, options);
        assert_eq!(outcome.violation, None, "seed {seed}\n{}", outcome.trace.join("\n"));
    }
}
