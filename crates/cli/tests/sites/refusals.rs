//! What is refused, down to the words: before any compute, with the command that mends it.

use crate::support::{Coordinator, Place, Process, join, wait_for};
use base::ContentHash;
use serde_json::Value;
use std::fs;
use std::net::TcpListener;
use std::path::Path;
use telemetry::Event;

fn hash(path: &Path) -> String {
    ContentHash::of(&fs::read(path).unwrap()).to_string()
}

#[test]
fn other_files_and_other_models_are_refused_on_join() {
    let place = Place::new();
    place.init("run", &["sync.sites=2"]);
    let coordinator = Coordinator::start(&place, "run", &[]);
    for file in ["data/tokenizer.json", "data/train-00000.tokens", "data/manifest.json"] {
        let (theirs, ours) = (place.join("run").join(file), place.join("site-b").join(file));
        assert!(theirs.is_file(), "{file}: {:?}", fs::read_dir(place.join("run/data")).unwrap().collect::<Vec<_>>());
        fs::create_dir_all(ours.parent().unwrap()).unwrap();
        fs::write(&ours, "{}").unwrap();
        let expected = format!(
            "error: site-b/{file}: the file here has BLAKE3 {}, the run's has {}\n\
             hint: remove it and join again: `rm site-b/{file}`\n",
            hash(&ours),
            hash(&theirs)
        );
        assert_eq!(coordinator.join(&place, "site-b", &[]).end().failure(), expected);
        fs::remove_file(&ours).unwrap();
    }
    place.init("site-c", &["model.hidden_size=16", "run.name=run"]);
    let model_hash = |run: &str| {
        let text = fs::read_to_string(place.join(run).join("run.toml")).unwrap();
        base::RunConfig::from_toml(&text).unwrap().model_hash()
    };
    let expected = format!(
        "error: site-c: the model here ({}) is not the run's ({})\n\
         hint: use another folder: `beringia join INVITE --folder site-c-2`\n",
        model_hash("site-c"),
        model_hash("run")
    );
    assert_eq!(coordinator.join(&place, "site-c", &[]).end().failure(), expected);
    for site in ["site-b", "site-c"] {
        let computed = place.events(site).iter().any(|record| !matches!(record.event, Event::PeerRefused { .. }));
        assert!(!computed, "{site} was refused before it computed anything");
    }
}

#[test]
fn a_port_or_a_run_in_use_is_refused() {
    let place = Place::new();
    place.init("run", &[]);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let expected = format!(
        "error: port {port} is in use on 127.0.0.1\n\
         hint: take another one with `--listen 127.0.0.1:{}`, or see who has it: `ss -ltnp 'sport = :{port}'`\n",
        if port < u16::MAX { port + 1 } else { 7447 }
    );
    let address = format!("127.0.0.1:{port}");
    assert_eq!(place.ended(&["serve", "run", "--listen", &address]).failure(), expected);
    let coordinator = Coordinator::start(&place, "run", &[]);
    let site = place.ended(&["join", &coordinator.invite, "--listen", &address]);
    assert_eq!(site.failure(), expected);
    let second = place.ended(&["serve", "run", "--listen", "127.0.0.1:0"]);
    assert_eq!(
        second.failure(),
        "error: run/coordinator.redb: another coordinator of this run is at work\n\
         hint: stop the other `beringia serve` of this run first: `pgrep -af 'beringia serve'`\n"
    );
}

#[test]
fn an_invite_that_is_wrong_old_or_of_another_run_is_refused() {
    let place = Place::new();
    place.init("run", &[]);
    place.init("other", &[]);
    let first = Coordinator::start(&place, "run", &[]);
    let (old, address) = (first.invite.clone(), first.address());
    let last = if old.ends_with('0') { "1" } else { "0" };
    let typo = format!("{}{last}", &old[..old.len() - 1]);
    let whole_word = "hint: copy the whole word that `beringia serve` printed, from 'beringia1-' to its end\n";
    assert_eq!(
        join(&place, &typo, "site-a", &[]).end().failure(),
        format!("error: the invite's checksum does not fit: a character is wrong, missing or too many\n{whole_word}")
    );
    assert_eq!(
        join(&place, "run", "site-a", &[]).end().failure(),
        format!("error: this is not an invite: an invite starts with 'beringia1-'\n{whole_word}")
    );
    first.process.terminate();
    first.process.end();
    let again = Coordinator::start(&place, "run", &["--listen", &address]);
    let invalid = "error: the coordinator refuses this site: the invite is not valid any more\n\
                   hint: ask for a new invite: `beringia admit` makes one\n";
    assert_eq!(join(&place, &old, "site-a", &[]).end().failure(), invalid);
    again.process.terminate();
    again.process.end();
    let _other = Coordinator::start(&place, "other", &["--listen", &address]);
    let failure = join(&place, &old, "site-a", &[]).end();
    let failure = failure.failure();
    assert!(
        failure.starts_with(&format!("error: {address} is not who it should be: expected fingerprint ")),
        "{failure}"
    );
    let hint = "hint: its key has changed, or another machine answers: ask for a new invite from `beringia serve`\n";
    assert!(failure.ends_with(hint), "{failure}");
}

#[test]
fn an_invite_for_one_admits_one_and_who_is_revoked_leaves_for_good() {
    let place = Place::new();
    place.init("run", &["sync.sites=2", "train.steps=1000000"]);
    assert!(place.ended(&["admit", "run"]).failure().contains("no coordinator of this run has listened yet"));
    let coordinator = Coordinator::start(&place, "run", &[]);
    let first = coordinator.join(&place, "site-a", &[]);
    let invite = place.object(&["admit", "run", "--hours", "1"])["invite"].as_str().unwrap().to_owned();
    fs::write(place.join("invite.txt"), format!("{invite}\n")).unwrap();
    // What was made a moment ago is known within a second.
    let second = wait_for("a place for site-b", || {
        let mut site = join(&place, "@invite.txt", "site-b", &[]);
        let entered = || place.events("run").iter().any(|record| is_entry(&record.event, "site-b"));
        let decided = wait_for("a decision about site-b", || (site.has_ended() || entered()).then(entered));
        decided.then_some(site)
    });
    place.wait_for_commit("run", 2);
    let used = join(&place, &invite, "site-c", &[]).end();
    assert!(used.failure().contains("the invite is not valid any more"), "{}", used.failure());
    let states = || {
        let members = place.object(&["members", "run"])["members"].clone();
        let state = |member: &Value| (member["name"].clone(), member["connected"].clone(), member["revoked"].clone());
        members.as_array().unwrap().iter().map(state).collect::<Vec<_>>()
    };
    let state = |name: &str, connected: bool, revoked: bool| (name.into(), connected.into(), revoked.into());
    let both = vec![state("site-a", true, false), state("site-b", true, false)];
    wait_for("both among the members", || (states() == both).then_some(()));
    assert!(place.ended(&["revoke", "run", "site-x"]).failure().contains("no member of this run is 'site-x'"));
    place.object(&["revoke", "run", "site-b"]);
    let revoked = second.end();
    assert!(revoked.failure().contains("its key was revoked"), "{}", revoked.failure());
    wait_for("site-b among the revoked", || (states()[1] == state("site-b", false, true)).then_some(()));
    let again = coordinator.join(&place, "site-b", &[]).end();
    assert!(again.failure().contains("this machine's key was revoked"), "{}", again.failure());
    let committed =
        place.events("run").iter().filter(|record| matches!(record.event, Event::RoundCommitted { .. })).count();
    place.wait_for_commit("run", committed as u64 + 2);
    first.terminate();
    first.end();
    coordinator.process.terminate();
    let log = fs::read_to_string(place.join("run/events.jsonl")).unwrap() + &coordinator.process.end().stderr;
    assert!(!log.contains(invite.trim_start_matches("beringia1-")), "an invite is in no log");
}

/// Whether a site of that name came in.
fn is_entry(event: &Event, wanted: &str) -> bool {
    matches!(event, Event::SiteJoined { name, .. } if name == wanted)
}

#[test]
fn a_coordinator_that_is_not_there_is_named() {
    let place = Place::new();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let secret = wire::Secret::generate().unwrap();
    let invite = wire::Invite::new(&format!("127.0.0.1:{port}"), "run", ContentHash::of(b"nobody"), secret).unwrap();
    let expected = format!(
        "error: cannot reach 127.0.0.1:{port}: Connection refused (os error 111)\n\
         hint: see that `beringia serve` or the site runs there and that no firewall is between: `nc -vz 127.0.0.1 {port}`\n"
    );
    assert_eq!(join(&place, &invite.to_string(), "site-a", &[]).end().failure(), expected);
    assert_eq!(place.ended(&["status", &invite.to_string()]).failure(), expected);
}

#[test]
fn a_full_disk_does_not_stop_training_and_the_old_checkpoint_stays() {
    let place = Place::new();
    place.init("run", &["train.steps=40", "checkpoint.every_rounds=1"]);
    place.object(&["train", "run", "--steps", "10"]);
    // No file may grow beyond 40 KiB: the model alone has 100, the event log of this test 15.
    let script = "trap '' XFSZ; ulimit -f 80; exec \"$0\" \"$@\"";
    let mut limited = std::process::Command::new("sh");
    limited.args(["-c", script, env!("CARGO_BIN_EXE_beringia"), "--json", "train", "run", "--steps", "20"]);
    limited.current_dir(place.path());
    let ended = Process::start(&place, "train", &mut limited).end();
    let warning = "warning: no checkpoint was saved, training goes on and the one before stays: run/checkpoints/";
    assert!(ended.stderr.contains(warning), "{ended:?}");
    assert!(ended.stderr.contains("no room for a checkpoint of ") && ended.stderr.contains("\nhint: "), "{ended:?}");
    let end = "error: run: step 20 could not be saved; the run stands at its last checkpoint\n\
               hint: make room (`df -h run`), then `beringia train run` goes on from there\n";
    assert!(ended.code == Some(1) && ended.stderr.ends_with(end), "{ended:?}");
    let steps = place.events("run").into_iter().filter(|record| matches!(record.event, Event::Step { .. })).count();
    assert_eq!(steps, 20, "training went on: {ended:?}");
    let resumed = place.ended(&["train", "run", "--steps", "20"]);
    assert!(resumed.stdout.contains("resuming at step 10 of 40\n"), "{resumed:?}");
    assert_eq!(resumed.code, Some(0), "{resumed:?}");
}
