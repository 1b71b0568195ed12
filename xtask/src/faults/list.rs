//! The faults that a run must survive, what is done about each in a test, and what is seen then.

/// A test binary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Suite {
    pub(super) package: &'static str,
    /// A file or folder in `tests`; the library's own tests where there is none.
    pub(super) target: Option<&'static str>,
}

/// A test.
#[derive(Debug, Clone, Copy)]
pub(super) struct Proof {
    pub(super) suite: Suite,
    pub(super) test: &'static str,
}

/// A row of the table.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fault {
    pub(super) name: &'static str,
    pub(super) done: &'static str,
    pub(super) seen: &'static str,
    /// Names under which its tests leave figures.
    pub(super) figures: &'static [&'static str],
    pub(super) proofs: &'static [Proof],
}

impl Suite {
    pub(super) fn name(&self) -> String {
        match self.target {
            Some(target) => format!("{}/{target}", self.package),
            None => self.package.to_owned(),
        }
    }
}

const SITES: Suite = Suite { package: "cli", target: Some("sites") };
const COMMANDS: Suite = Suite { package: "cli", target: Some("commands") };
const WIRE: Suite = Suite { package: "wire", target: None };
const FORMATS: Suite = Suite { package: "formats", target: None };
const CHECKPOINT: Suite = Suite { package: "checkpoint", target: None };
const DAMAGE: Suite = Suite { package: "checkpoint", target: Some("damage") };
const COORDINATOR: Suite = Suite { package: "coordinator", target: None };
const GOLDEN: Suite = Suite { package: "site", target: Some("golden") };
const LIARS: Suite = Suite { package: "site", target: Some("liars") };
const ENGINES: Suite = Suite { package: "site", target: Some("engines") };
const FENCING: Suite = Suite { package: "rounds", target: Some("fencing") };
const PROTOCOL: Suite = Suite { package: "rounds", target: Some("protocol") };
const LOSSES: Suite = Suite { package: "rounds", target: Some("losses") };
const SITE: Suite = Suite { package: "site", target: None };
const SIMULATED: Suite = Suite { package: "simulator", target: Some("clean") };

const fn proof(suite: Suite, test: &'static str) -> Proof {
    Proof { suite, test }
}

const LAB: Proof = proof(SITES, "what_is_killed_stopped_or_cut_off_comes_back_and_no_invariant_is_violated");
const SEEDS: Proof = proof(SIMULATED, "no_invariant_is_violated");
const LEFT_BEHIND: Proof = proof(SITES, "a_site_that_is_killed_in_mid_round_does_not_stop_the_others");
const COORDINATOR_AGAIN: Proof = proof(SITES, "a_coordinator_that_is_killed_and_started_again_is_found_by_its_sites");
const STOPPED: Proof =
    proof(SITES, "a_site_that_is_stopped_is_missed_after_its_silence_and_takes_part_again_when_it_goes_on");
const STRANGERS: Proof = proof(SITES, "strangers_neither_stop_a_run_nor_take_its_memory");
const OTHER_FILES: Proof = proof(SITES, "other_files_and_other_models_are_refused_on_join");

/// In the order of the reader's questions: processes, links, peers, disks.
pub(super) const FAULTS: &[Fault] = &[
    Fault {
        name: "kill -9 of a site while it computes",
        done: "SIGKILL in mid-round, started again after a pause",
        seen: "the others commit without it; it comes back with its checkpoint, fetches what is newer, and has a part in the next round",
        figures: &["lab-kill-site-b"],
        proofs: &[LEFT_BEHIND, LAB],
    },
    Fault {
        name: "kill -9 of a site while it sends",
        done: "simulated: killed at any instant; a holder dies in mid-transfer",
        seen: "the rest of the bytes comes from another holder, or the round closes without that delta",
        figures: &[],
        proofs: &[SEEDS, proof(WIRE, "a_holder_that_dies_in_mid_transfer_is_replaced_by_another")],
    },
    Fault {
        name: "kill -9 of a site after the commit and before it applies it",
        done: "simulated: killed at any instant",
        seen: "it comes back with an older state, and follows or fetches",
        figures: &[],
        proofs: &[SEEDS],
    },
    Fault {
        name: "kill -9 of the coordinator while it is idle or collects",
        done: "SIGKILL three times, and in the lab once; started again on its port",
        seen: "sites keep their state, call, and go on in a new term; the processes of the beginning end the run",
        figures: &["lab-kill-coordinator"],
        proofs: &[COORDINATOR_AGAIN, LAB],
    },
    Fault {
        name: "kill -9 of the coordinator between log and broadcast, or during a join",
        done: "simulated: it dies at any write or sync of its log, and amid its messages; a decision whose log write fails",
        seen: "what was acknowledged is in the log, and nothing was sent that is not",
        figures: &[],
        proofs: &[SEEDS, proof(COORDINATOR, "nothing_is_sent_of_a_decision_that_is_not_in_the_log")],
    },
    Fault {
        name: "SIGSTOP of a site; a half-open connection",
        done: "stopped until the coordinator misses it (20 s of silence on an open connection), then let go; in the lab for 1 s",
        seen: "the others wait for that long, go on without it, and it takes part again; no process is lost",
        figures: &["stopped-site", "lab-stop-site-a"],
        proofs: &[STOPPED, LAB],
    },
    Fault {
        name: "a whole site lost for good",
        done: "SIGKILL, never started again",
        seen: "its samples are leased again, the run ends identical on the others",
        figures: &[],
        proofs: &[LEFT_BEHIND],
    },
    Fault {
        name: "all processes lost",
        done: "SIGKILL of both sites and the coordinator, all started again",
        seen: "the run goes on from the newest state that a disk has",
        figures: &["all-killed"],
        proofs: &[proof(SITES, "a_run_whose_processes_are_all_killed_goes_on_from_what_is_on_disk")],
    },
    Fault {
        name: "SIGTERM",
        done: "a site whose engine is in a long step, one that is not ready, a coordinator in mid-round",
        seen: "it saves and leaves within 25 s, or leaves with what is on disk; what comes back goes on",
        figures: &[],
        proofs: &[
            proof(SITES, "a_site_whose_engine_is_busy_leaves_all_the_same_and_comes_back"),
            proof(SITES, "a_site_that_is_asked_to_leave_before_it_is_ready_is_gone_at_once"),
            proof(SITES, "a_coordinator_that_is_asked_to_leave_in_mid_round_leaves_and_the_run_goes_on"),
        ],
    },
    Fault {
        name: "partition, both ways",
        done: "the lab's link between two sites is cut; simulated: any link",
        seen: "the round waits or closes without; connections that both ends keep go on",
        figures: &["lab-cut-site-a-site-b"],
        proofs: &[LAB, SEEDS],
    },
    Fault {
        name: "partition, one way",
        done: "simulated: any direction",
        seen: "as above",
        figures: &[],
        proofs: &[SEEDS],
    },
    Fault {
        name: "delayed and reordered messages",
        done: "any order of arrival in the member's state machine; simulated: delays of up to 43 times",
        seen: "an engine does the same in the same order, with the same bits",
        figures: &[],
        proofs: &[proof(PROTOCOL, "an_engine_does_the_same_in_the_same_order_whatever_arrives_when"), SEEDS],
    },
    Fault {
        name: "clock set an hour off",
        done: "simulated: the coordinator's clock jumps ahead by up to an hour",
        seen: "sites that are due are dropped and come back",
        figures: &[],
        proofs: &[SEEDS],
    },
    Fault {
        name: "bits that flip in flight",
        done: "every bit of recorded frames; a damaged chunk; simulated: in deltas and states",
        seen: "an error that names it, and the chunk is fetched anew",
        figures: &[],
        proofs: &[
            proof(WIRE, "bit_flips_never_panic"),
            proof(WIRE, "a_damaged_chunk_is_noticed_and_fetched_again"),
            SEEDS,
        ],
    },
    Fault {
        name: "huge length",
        done: "in a frame, inside a message, of a blob and of a chunk",
        seen: "refused before memory is taken",
        figures: &[],
        proofs: &[
            proof(WIRE, "a_huge_length_is_refused_before_memory_is_taken"),
            proof(WIRE, "trailing_bytes_and_huge_inner_lengths_are_refused"),
            proof(WIRE, "lengths_are_checked_before_memory_is_taken"),
        ],
    },
    Fault {
        name: "garbage and silence before authentication",
        done: "400 connections of five kinds to the coordinator and to a site in a run",
        seen: "refused with the reason, within 10 s; the run goes on in bounded memory",
        figures: &[],
        proofs: &[
            STRANGERS,
            proof(WIRE, "garbage_is_refused_and_others_are_served"),
            proof(WIRE, "silence_and_half_a_handshake_end_with_the_deadline"),
        ],
    },
    Fault {
        name: "stale term",
        done: "an older coordinator comes back; simulated: it has the address for a while",
        seen: "refused before it can ask for anything, also by a site that was started again",
        figures: &[],
        proofs: &[
            proof(FENCING, "an_older_coordinator_is_refused_before_it_can_ask_for_anything"),
            proof(FENCING, "a_site_that_starts_again_has_not_forgotten_the_newest_term"),
            SEEDS,
        ],
    },
    Fault {
        name: "wrong model, tokenizer, data",
        done: "another file in a site's folder, another model",
        seen: "refused on joining, with both hashes and the command that mends it",
        figures: &[],
        proofs: &[OTHER_FILES],
    },
    Fault {
        name: "version one older and one newer",
        done: "a peer of each, on both sides of a connection",
        seen: "refused, with both versions named",
        figures: &[],
        proofs: &[
            proof(WIRE, "the_listener_names_older_newer_and_foreign_peers"),
            proof(WIRE, "the_client_names_older_and_newer_servers"),
        ],
    },
    Fault {
        name: "numbers that are not finite",
        done: "an engine that gives one; encoded deltas that hold one, wherever it stands",
        seen: "the site names the step and sends nothing; who decodes refuses",
        figures: &[],
        proofs: &[
            proof(ENGINES, "a_number_that_is_not_finite_is_named_with_its_step_and_never_sent"),
            proof(FORMATS, "what_was_not_finite_is_refused_wherever_it_stood"),
        ],
    },
    Fault {
        name: "disk full",
        done: "a limit of 40 KiB a file; no room for a checkpoint; simulated: of coordinator and sites",
        seen: "training goes on, the checkpoint before stays",
        figures: &[],
        proofs: &[
            proof(SITES, "a_full_disk_does_not_stop_training_and_the_old_checkpoint_stays"),
            proof(CHECKPOINT, "a_full_disk_keeps_the_old_checkpoint_and_says_how_much_was_needed"),
            SEEDS,
        ],
    },
    Fault {
        name: "torn checkpoint",
        done: "a crash at every step of a save; damage anywhere in one",
        seen: "refused, and the one before is taken",
        figures: &[],
        proofs: &[
            proof(CHECKPOINT, "a_crash_at_any_step_leaves_a_checkpoint_that_loads"),
            proof(CHECKPOINT, "damage_anywhere_is_refused_and_the_one_before_is_taken"),
            proof(DAMAGE, "a_thousand_truncations_and_flipped_bits_are_all_refused_and_the_checkpoint_before_is_taken"),
            proof(COMMANDS, "a_damaged_checkpoint_falls_back_and_says_so"),
        ],
    },
    Fault {
        name: "messages that come twice, out of order and late",
        done: "every message to a site and to the coordinator said twice, each with a delay; frames that are sent twice below TLS end the connection",
        seen: "the same final hash as a clean run",
        figures: &[],
        proofs: &[proof(PROTOCOL, "messages_that_come_twice_and_late_change_nothing")],
    },
    Fault {
        name: "10^6 flipped bits in flight",
        done: "one bit each of deltas and states on their way, past TLS",
        seen: "none is accepted: chunks and whole have their hashes",
        figures: &[],
        proofs: &[proof(WIRE, "none_of_a_million_flipped_bits_is_accepted")],
    },
    Fault {
        name: "a device that computes something wrong and does not say so",
        done: "one bit flips in a step's result; a device that is wrong the same way each time",
        seen: "the step is made again, by itself or by others with the same engine; it is named, what its site has given is left out",
        figures: &[],
        proofs: &[
            proof(ENGINES, "one_bit_that_flips_in_either_of_two_computations_is_found_and_the_step_undone"),
            proof(ENGINES, "a_site_with_a_wrong_step_is_named_and_its_delta_left_out"),
            proof(ENGINES, "a_device_that_is_wrong_the_same_way_each_time_is_found_by_two_others"),
        ],
    },
    Fault {
        name: "a newcomer whose line breaks while it fetches the state, or who is killed then",
        done: "two holders that forget the state for a while; another process after a failed one",
        seen: "all holders give it at once, and what had come is not fetched again",
        figures: &[],
        proofs: &[
            proof(SITE, "a_state_comes_from_several_holders_and_what_had_come_is_not_fetched_again"),
            proof(SITE, "another_process_goes_on_where_one_was_killed"),
        ],
    },
    Fault {
        name: "a coordinator that dies while it tells its sites that the run is over",
        done: "the one that was told has left; the other calls the next process; simulated: seed 0x23c3509e",
        seen: "the run is over for it too, after a deadline",
        figures: &[],
        proofs: &[proof(LOSSES, "who_missed_the_end_is_told_when_those_with_the_last_state_were_told_before"), SEEDS],
    },
    Fault {
        name: "a peer that sends a delta of numbers that are not finite, or another than it announced",
        done: "one of three sites has it on its shelf, over real connections",
        seen: "the others refuse it and count that, its site is dropped at the deadline, they end with one state",
        figures: &[],
        proofs: &[
            proof(LIARS, "a_delta_with_nan_in_it_is_refused_counted_and_its_site_dropped"),
            proof(LIARS, "an_infinite_delta_is_refused_counted_and_its_site_dropped"),
            proof(LIARS, "a_delta_with_another_hash_than_announced_is_refused_counted_and_its_site_dropped"),
        ],
    },
    Fault {
        name: "a delta times 10^4, sign-flipped or random",
        done: "one of four sites, in every round; loss in nats a token after 150 steps",
        seen: "a trimmed mean loses at most 1 %; clipping keeps the harm of a round small and is not enough against a flipped sign",
        figures: &["one_liar"],
        proofs: &[proof(GOLDEN, "one_liar_of_four_costs_a_trimmed_mean_at_most_a_hundredth_of_the_loss")],
    },
    Fault {
        name: "a revoked key",
        done: "`beringia revoke` of a site in a run, which then calls again",
        seen: "its connection ends, it is in no further plan, its key is refused; the others go on",
        figures: &[],
        proofs: &[proof(SITES, "an_invite_for_one_admits_one_and_who_is_revoked_leaves_for_good")],
    },
];
