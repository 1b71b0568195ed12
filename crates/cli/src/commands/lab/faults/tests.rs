//! What the command line says of faults, and when they come.

use super::*;
use clap::Parser;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    faults: FaultArgs,
}

fn resolve(words: &[&str]) -> Result<Faults, Failure> {
    let line = Line::try_parse_from([&["lab"], words].concat()).unwrap();
    let sites = ["site-a", "site-b"].map(str::to_owned);
    line.faults.resolve(&sites, true, Some(100.0), 7)
}

fn faults(words: &[&str]) -> Vec<(What, f64, f64)> {
    let resolved = resolve(words).unwrap();
    let all = resolved.schedule;
    (0..words.len() / 2).map(|index| all.fault(index)).map(|fault| (fault.what, fault.from, fault.to)).collect()
}

#[test]
fn a_fault_is_who_and_when() {
    let found = faults(&["--kill", "coordinator@40s", "--kill", "site-b@20s", "--kill", "a@1.5min"]);
    assert_eq!(found, [(What::Kill(1), 20.0, 23.0), (What::Kill(2), 40.0, 43.0), (What::Kill(0), 90.0, 93.0)]);
    assert_eq!(faults(&["--stop", "b@500ms..10s"]), [(What::Stop(1), 0.5, 10.0)]);
    for (text, cut) in [
        ("a-b@30s..45s", What::Cut { from: 0, to: 1, both: true }),
        ("site-a-site-b@30s..45s", What::Cut { from: 0, to: 1, both: true }),
        ("site-b>coordinator@30s..45s", What::Cut { from: 1, to: 2, both: false }),
        ("coordinator-a@30s..45s", What::Cut { from: 2, to: 0, both: true }),
    ] {
        assert_eq!(faults(&["--cut", text]), [(cut, 30.0, 45.0)], "{text}");
    }
}

#[test]
fn what_makes_no_sense_is_refused_with_the_reason() {
    for (words, reason) in [
        (
            &["--kill", "site-c@20s"][..],
            "--kill site-c@20s: there is no 'site-c'; this lab has site-a, site-b, coordinator",
        ),
        (&["--kill", "site-b"], "--kill site-b: WHO@TIME is expected, as in site-b@20s"),
        (&["--kill", "site-b@20"], "'20' is not a time up to a day, as in 20s, 500ms or 2min"),
        (&["--kill", "site-b@-1s"], "'-1s' is not a time"),
        (&["--kill", "site-b@1e3s"], "'1e3s' is not a time"),
        (&["--kill", "site-b@100s"], "kill site-b@100s: the lab trains for 100 s"),
        (&["--kill", "b@20s", "--kill", "b@22s"], "'kill site-b@22s' comes before 'kill site-b@20s' is over, at 23 s"),
        (&["--kill", "b@20s", "--stop", "b@10s..30s"], "'kill site-b@20s' comes before 'stop site-b@10s..30s' is over"),
        (&["--stop", "b@20s"], "'20s' is not FROM..TO, as in 30s..45s"),
        (&["--stop", "b@20s..10s"], "'20s..10s' ends before it begins"),
        (&["--cut", "a@30s..45s"], "'a' is not A-B or A>B of site-a, site-b, coordinator"),
        (&["--cut", "a-c@30s..45s"], "'a-c' is not A-B or A>B"),
        (&["--cut", "a-a@30s..45s"], "no link from a place to itself"),
        (&["--cut", "a-b@1s..9s", "--cut", "b>a@5s..6s"], "'cut site-b>site-a@5s..6s' comes before 'cut site-a-site-b"),
        (&["--restart-after", "11min"], "--restart-after 11min: 0s to 600s are expected"),
        (&["--chaos", "10"], "--chaos 10: 12 s to a day are expected, at least 4 times --restart-after"),
        (&["--chaos", "NaN"], "--chaos NaN: 12 s to a day are expected"),
    ] {
        let refused = resolve(words).unwrap_err();
        assert!(refused.message.contains(reason), "{words:?}: {}", refused.message);
        assert!(refused.hint.contains("`--kill site-b@20s`"), "{}", refused.hint);
    }
    let line = Line::try_parse_from(["lab", "--cut", "a-b@1s..2s"]).unwrap();
    let refused = line.faults.resolve(&["site-a", "site-b"].map(str::to_owned), false, None, 7).unwrap_err();
    assert_eq!(refused.message, "--cut needs links that can be cut: add --link");
    assert!(Line::try_parse_from(["lab", "--chaos", "60", "--kill", "a@1s"]).is_err(), "one or the other");
}

#[test]
fn what_is_due_comes_once_and_in_order() {
    let mut schedule = resolve(&["--kill", "b@20s", "--cut", "a-b@21s..22s", "--kill", "a@23s"]).unwrap().schedule;
    let mut due = |seconds| std::iter::from_fn(|| schedule.next(seconds)).collect::<Vec<_>>();
    assert_eq!(due(19.9), []);
    assert_eq!(due(20.0), [Action::Begin(0)]);
    assert_eq!(due(20.5), []);
    assert_eq!(due(60.0), [Action::Begin(1), Action::Mend(1), Action::Mend(0), Action::Begin(2), Action::Mend(2)]);
    assert_eq!(due(90.0), []);
}

#[test]
fn chaos_is_the_same_for_a_seed_and_kills_all_equally_often() {
    let drawn = |seed: &str| {
        let mut resolved = resolve(&["--chaos", "60", "--chaos-seed", seed]).unwrap();
        assert_eq!(resolved.chaos, Some((seed.parse().unwrap(), 60.0)));
        let kills = std::iter::from_fn(|| resolved.schedule.next(900.0));
        kills.filter(|action| matches!(action, Action::Begin(_))).count()
    };
    assert_eq!(drawn("1"), 15, "one a minute");
    let all = |seed: &str| {
        let schedule = resolve(&["--chaos", "60", "--chaos-seed", seed]).unwrap().schedule;
        (0..15).map(|index| schedule.fault(index)).collect::<Vec<Fault>>()
    };
    assert_eq!(all("1"), all("1"));
    assert_ne!(all("1"), all("2"));
    for place in 0..3 {
        let kills = all("1").iter().filter(|fault| fault.what == What::Kill(place)).count();
        assert_eq!(kills, 5, "place {place}");
    }
    for pair in all("1").windows(2) {
        let apart = pair[1].from - pair[0].from;
        assert!((30.0..=90.0).contains(&apart), "{apart}");
    }
    assert_eq!(resolve(&["--chaos", "60"]).unwrap().chaos, Some((7, 60.0)), "a fresh seed where none is given");
}
