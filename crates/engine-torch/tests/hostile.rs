//! A program that connects in Python's place and says what it should not. No Python is needed.

#![allow(clippy::unwrap_used)] // Helpers of tests may panic, as the tests do.

use base::config::TrainSection;
use base::{Fragment, TokenBatch};
use engine::conformance::{random_batch, tiny_shape};
use engine::{Engine, EngineError, initial_parameters};
use engine_torch::{ModelDescription, Start, TorchEngine, TorchOptions};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;

/// What the other side does with a request.
enum Reply {
    Say(Value),
    /// Bytes as they are, then the end.
    Raw(Vec<u8>),
    End,
}

type Answerer = dyn Fn(&str, &Value) -> Reply + Send + Sync;

fn frame(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u32).to_le_bytes()[..], text].concat()
}

fn read_request(stream: &mut UnixStream) -> Option<Value> {
    let mut length = [0; 4];
    stream.read_exact(&mut length).ok()?;
    let mut text = vec![0; u32::from_le_bytes(length) as usize];
    stream.read_exact(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}

fn serve(mut stream: UnixStream, answer: &Answerer) {
    let mut request = json!({ "op": "hello" });
    loop {
        let said = match answer(request["op"].as_str().unwrap_or_default(), &request) {
            Reply::Say(value) => stream.write_all(&frame(value.to_string().as_bytes())),
            Reply::Raw(bytes) => {
                // The agent may have closed already.
                let _ = stream.write_all(&bytes);
                return;
            }
            Reply::End => return,
        };
        match said.ok().and_then(|()| read_request(&mut stream)) {
            Some(next) => request = next,
            None => return,
        }
    }
}

/// Options under which `answer` speaks in Python's place.
fn options(answer: impl Fn(&str, &Value) -> Reply + Send + Sync + 'static) -> TorchOptions {
    let answer: Arc<Answerer> = Arc::new(answer);
    let show = move |line: &str| {
        let socket = line.split(" --socket ").nth(1).unwrap().split(' ').next().unwrap().to_owned();
        let answer = Arc::clone(&answer);
        thread::spawn(move || serve(UnixStream::connect(socket).unwrap(), &*answer));
    };
    TorchOptions { start: Start::Print(Arc::new(show)), ..TorchOptions::new("fake") }
}

fn open(options: &TorchOptions) -> Result<TorchEngine, EngineError> {
    let shape = tiny_shape(false);
    let model = ModelDescription::Llama(shape.clone());
    TorchEngine::new(&model, &TrainSection::default(), options, &initial_parameters(&shape, 1))
}

fn parameters() -> Value {
    let schema = base::ParameterSchema::llama(&tiny_shape(false));
    schema.parameters().iter().map(|parameter| json!([parameter.name, parameter.shape])).collect()
}

/// What a good engine answers.
fn good(operation: &str, request: &Value) -> Value {
    let tokens = request["samples"].as_u64().unwrap_or(0) * request["sequence_length"].as_u64().unwrap_or(0);
    match operation {
        "hello" => {
            json!({ "protocol": 1, "package": "0", "python": "3", "torch": "2", "pid": 1, "rank_count": 1 })
        }
        "init" => json!({ "ok": true, "compiled": false, "parameters": parameters(), "device": {
            "name": "fake", "maker": "", "driver": "", "memory_bytes": null, "threads": 1, "precision": "f32" } }),
        "inner_step" | "gradient" => json!({ "ok": true, "loss_nats": 1.0, "tokens": tokens, "gradient_norm": 1.0,
            "seconds": 0.1, "joules": null }),
        "evaluate" => json!({ "ok": true, "nats": 2.0, "tokens": tokens }),
        "save" => json!({ "ok": true, "optimizer_steps": 0, "has_moments": false }),
        "operation" => json!({ "ok": true, "elements": 1 }),
        _ => json!({ "ok": true }),
    }
}

/// Good, except that `bad` answers `operation`.
fn all_good_but(operation: &'static str, bad: impl Fn() -> Reply + Send + Sync + 'static) -> TorchOptions {
    options(move |asked, request| if asked == operation { bad() } else { Reply::Say(good(asked, request)) })
}

fn batch() -> TokenBatch {
    random_batch(&tiny_shape(false), 2, 8, 1)
}

fn lost<T: std::fmt::Debug>(result: Result<T, EngineError>) -> String {
    match result {
        Err(EngineError::Lost { device, reason }) => {
            assert_eq!(device, "torch:fake");
            reason
        }
        other => panic!("{other:?}"),
    }
}

fn not_started(options: &TorchOptions) -> String {
    match open(options) {
        Err(error @ (EngineError::Device { .. } | EngineError::Lost { .. } | EngineError::Shape { .. })) => {
            error.to_string()
        }
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("an engine"),
    }
}

#[test]
fn the_good_one_is_believed_and_printed_commands_can_start_it_again() {
    let mut engine = open(&options(|asked, request| Reply::Say(good(asked, request)))).unwrap();
    assert_eq!(engine.device().engine, "torch:fake");
    assert_eq!(engine.inner_step(&batch(), 1e-3).unwrap().tokens, 16);
    assert_eq!(engine.evaluate(&batch()).unwrap().nats, 2.0);
    assert_eq!(engine.process_id(), None);
    engine.interrupter().unwrap()();
    assert_eq!(lost(engine.inner_step(&batch(), 1e-3)), "it was ended because it did not answer");
    engine.recover().unwrap();
    engine.inner_step(&batch(), 1e-3).unwrap();
}

#[test]
fn a_first_frame_that_is_none_of_ours_is_refused() {
    let greeting = |reply: fn() -> Reply| not_started(&all_good_but("hello", reply));
    let hello = |change: fn(&mut Value)| {
        let mut hello = good("hello", &Value::Null);
        change(&mut hello);
        Reply::Say(hello)
    };
    assert!(greeting(|| Reply::End).contains("its connection ended"));
    assert!(greeting(|| Reply::Raw(vec![1, 2])).contains("its connection ended"));
    assert!(greeting(|| Reply::Raw(vec![0xFF; 64])).contains("a frame of 4294967295 bytes, more than 16777216"));
    assert!(greeting(|| Reply::Raw(frame(b"\xFF\xFE"))).contains("not of the protocol"));
    let newer = not_started(&all_good_but("hello", move || hello(|hello| hello["protocol"] = json!(2))));
    assert!(newer.contains("it speaks version 2 of the protocol, this agent version 1"), "{newer}");
    let ranks = not_started(&all_good_but("hello", move || hello(|hello| hello["rank_count"] = json!(7))));
    assert!(ranks.contains("it has 7 ranks, 1 were asked for"), "{ranks}");
    let silent =
        TorchOptions { start: Start::Print(Arc::new(|_| {})), connect_seconds: 0, ..TorchOptions::new("fake") };
    assert!(not_started(&silent).contains("in time"));
}

#[test]
fn a_model_that_was_not_asked_for_is_refused() {
    let init = |change: fn(&mut Value)| {
        not_started(&all_good_but("init", move || {
            let mut answer = good("init", &Value::Null);
            change(&mut answer);
            Reply::Say(answer)
        }))
    };
    let reshaped = init(|answer| answer["parameters"][0][1] = json!([29, 17]));
    assert!(reshaped.contains("model.embed_tokens.weight") && reshaped.contains("[29, 17]"), "{reshaped}");
    assert!(init(|answer| answer["parameters"] = json!([])).contains("is not in PyTorch's model"));
    assert!(init(|answer| answer["parameters"][0][1] = json!([-29, 16])).contains("not of the protocol"));
    assert!(init(|answer| answer["parameters"][0][1] = json!([1u64 << 40, 1u64 << 40])).contains("elements"));
    assert!(init(|answer| answer["parameters"][0] = json!(["x"])).contains("not of the protocol"));
    assert!(init(|answer| answer["device"] = json!(null)).contains("not of the protocol"));
    assert!(init(|answer| answer["device"]["precision"] = json!("fp4")).contains("not of the protocol"));
}

#[test]
fn answers_that_cannot_be_true_end_the_engine() {
    let step = |change: fn(&mut Value)| {
        let options = all_good_but("inner_step", move || {
            let mut answer = good("inner_step", &json!({ "samples": 2, "sequence_length": 8 }));
            change(&mut answer);
            Reply::Say(answer)
        });
        let mut engine = open(&options).unwrap();
        let reason = lost(engine.inner_step(&batch(), 1e-3));
        assert_eq!(lost(engine.evaluate(&batch())), reason, "and nothing is asked of it again");
        reason
    };
    assert!(step(|answer| answer["loss_nats"] = json!("NaN")).contains("not of the protocol"));
    assert!(step(|answer| answer["loss_nats"] = json!(-1.0)).contains("loss_nats: -1.0"));
    assert!(step(|answer| answer["gradient_norm"] = json!(null)).contains("not of the protocol"));
    assert!(step(|answer| answer["seconds"] = json!(-0.5)).contains("seconds: -0.5"));
    assert!(step(|answer| answer["tokens"] = json!(15)).contains("a step of 16 tokens"));
    assert!(step(|answer| answer["tokens"] = json!(-16)).contains("not of the protocol"));
    assert!(step(|answer| *answer = json!([1, 2])).contains("not of the protocol"));
    assert!(step(|answer| *answer = json!({ "error": { "kind": "mood" } })).contains("unknown kind 'mood'"));

    let raw = |reply: fn() -> Reply| lost(open(&all_good_but("inner_step", reply)).unwrap().inner_step(&batch(), 1e-3));
    assert!(raw(|| Reply::End).contains("its connection ended"));
    assert!(raw(|| Reply::Raw(frame(br#"{"loss_nats":NaN}"#))).contains("not of the protocol"));
    assert!(raw(|| Reply::Raw(frame(br#"{"loss_nats":1e999}"#))).contains("not of the protocol"));
    assert!(raw(|| Reply::Raw(frame(&[b'['; 100_000]))).contains("not of the protocol"));
    assert!(raw(|| Reply::Raw(frame(b"{}")[..5].to_vec())).contains("its connection ended"));
    assert!(raw(|| Reply::Raw((1u32 << 31).to_le_bytes().to_vec())).contains("more than 16777216"));
}

#[test]
fn other_calls_check_what_they_are_answered() {
    let mut evaluating = open(&all_good_but("evaluate", || Reply::Say(json!({ "nats": -2.0, "tokens": 16 })))).unwrap();
    assert!(lost(evaluating.evaluate(&batch())).contains("nats: -2.0"));
    let mut writing = open(&all_good_but("write", || Reply::Say(json!({ "ok": false })))).unwrap();
    let fragment = Fragment { index: 0, ranges: std::iter::once(0..3).collect() };
    assert!(lost(writing.write_fragment(&fragment, &[0.0; 3])).contains("neither"));
    let elements = u64::MAX;
    let mut computing = open(&all_good_but("operation", move || Reply::Say(json!({ "elements": elements })))).unwrap();
    let operation = &engine::numerics::operations()[0];
    assert!(lost(computing.operation(operation)).contains("elements where"));
    let saying = || Reply::Say(json!({ "optimizer_steps": -1, "has_moments": true }));
    let mut saving = open(&all_good_but("save", saying)).unwrap();
    assert!(lost(saving.save()).contains("not of the protocol"));
}

#[test]
fn a_refusal_leaves_the_engine_usable() {
    let refusal = json!({ "error": { "kind": "out_of_memory", "what": "x", "reason": "8 EiB were asked for" } });
    let mut engine = open(&all_good_but("inner_step", move || Reply::Say(refusal.clone()))).unwrap();
    let refused = engine.inner_step(&batch(), 1e-3);
    assert!(matches!(&refused, Err(EngineError::OutOfMemory { reason, .. }) if reason == "8 EiB were asked for"));
    engine.evaluate(&batch()).unwrap();
    assert!(matches!(engine.inner_step(&batch(), f64::NAN), Err(EngineError::NotFinite { .. })));
    engine.evaluate(&batch()).unwrap();
}
