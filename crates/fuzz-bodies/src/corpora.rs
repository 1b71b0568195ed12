//! Inputs that mean something, for each target: what a fuzzer begins with. `cargo run -p fuzz-bodies` writes them to `fuzz/corpus`.
//!
//! Each is made by the code that ships, so that a format that changes takes its corpora along.

use crate::codecs::{CODECS, fragment_codec};
use crate::coordination::{DATABASE, LINES, honest_run, said_to_coordinator, said_to_site};
use crate::network::unfinished;
use crate::{checkpoints, datasets};
use base::{ContentHash, Round, RunConfig, SiteId, Term};
use formats::CodecKind;
use formats::lowrank::{LowRank, MatrixShape};
use parquet::basic::Compression;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use rounds::coordinator::Record as Decision;
use rounds::{Directive, LeaveReason, Report, SiteDevice};
use serde::Serialize;
use std::sync::Arc;
use telemetry::Record;
use wire::message::{FromCoordinator, FromSite, Greeting, PackedFile, Role, RunFile, SiteHello, Welcome};
use wire::probe::{ProbeGreeting, ProbeKind};
use wire::{BlobKey, Identity, Invite, Purpose, Secret, frame, fuzzing};

/// Inputs with their names.
type Seeds = Vec<(&'static str, Vec<u8>)>;

fn body(message: &impl Serialize) -> Vec<u8> {
    framed(message)[size_of::<u32>()..].to_vec()
}

fn framed(message: &impl Serialize) -> Vec<u8> {
    frame::encode(message).expect("a small message fits a frame")
}

fn texts(texts: &[(&'static str, &str)]) -> Seeds {
    texts.iter().map(|(name, text)| (*name, text.as_bytes().to_vec())).collect()
}

fn hash() -> ContentHash {
    ContentHash::of(b"seed")
}

fn secret() -> Secret {
    frame::decode(&[7; 16]).expect("a secret is 16 bytes")
}

fn hello() -> SiteHello {
    SiteHello {
        name: "site-a".to_owned(),
        advertised_host: "a.example".to_owned(),
        port: 7_447,
        engine: "flex".to_owned(),
        threads: 2,
        slowdown: 1.0,
    }
}

fn observer() -> Greeting {
    Greeting { run: "run".to_owned(), secret: Some(secret()), role: Role::Observer }
}

fn site() -> Greeting {
    Greeting { run: "run".to_owned(), secret: None, role: Role::Site(hello()) }
}

pub(crate) fn frames() -> Seeds {
    let stream = [framed(&observer()), framed(&FromSite::Pulse), framed(&site())].concat();
    let too_long = (u32::MAX).to_le_bytes().to_vec();
    vec![("three", [&[5][..], &stream].concat()), ("too-long", [vec![1], too_long].concat())]
}

pub(crate) fn preamble() -> Seeds {
    let of = |purpose| fuzzing::preamble_bytes(purpose).to_vec();
    vec![("control", of(Purpose::Control)), ("blob", of(Purpose::Blob)), ("http", b"GET / HTTP/1".to_vec())]
}

pub(crate) fn tls_of_a_stranger() -> Seeds {
    let identity = Identity::generate().expect("a key can be made");
    vec![("hello", fuzzing::client_hello(&identity)), ("http", b"GET / HTTP/1.1\r\n\r\n".to_vec())]
}

pub(crate) fn tls_of_a_server() -> Seeds {
    // A TLS 1.2 alert, and the header of a handshake record.
    vec![("alert", vec![21, 3, 3, 0, 2, 2, 40]), ("record", vec![22, 3, 3, 0, 4, 2, 0, 0, 0])]
}

pub(crate) fn greeting() -> Seeds {
    vec![("observer", body(&observer())), ("site", body(&site()))]
}

pub(crate) fn from_coordinator() -> Seeds {
    let file = RunFile {
        name: "data/train-00000.tokens".to_owned(),
        bytes: 4_096,
        hash: hash(),
        packed: Some(PackedFile { bytes: 1_024, hash: hash() }),
    };
    let (files, run_toml) = (vec![file.clone(), file], config().to_toml());
    let welcome = Welcome { site: SiteId(1), run_toml, model_hash: hash(), files };
    let refused = FromCoordinator::Refused { reason: "no".to_owned(), hint: "ask".to_owned() };
    let dropped = FromCoordinator::Directive(Directive::Dropped { reason: LeaveReason::Diverged });
    let mut seeds = vec![
        ("welcome", body(&FromCoordinator::Welcome(welcome))),
        ("refused", body(&refused)),
        ("dropped", body(&dropped)),
        ("pulse", body(&FromCoordinator::Pulse)),
    ];
    let told = said_in(&honest_run(1).told);
    seeds.extend(["peers", "lead", "begin", "slice", "reduce", "part"].into_iter().zip(told));
    seeds
}

pub(crate) fn from_site() -> Seeds {
    let device = SiteDevice { engine: "flex".to_owned(), memory_bytes: Some(1 << 30), ..SiteDevice::default() };
    let fetched = FromSite::Fetched { round: Round(1), from: SiteId(2), bytes: 100, seconds: 0.5 };
    let mut seeds = vec![
        ("device", body(&FromSite::Report(Report::Device(device)))),
        ("fetched", body(&fetched)),
        ("leave", body(&FromSite::Report(Report::Leave { reason: LeaveReason::Stopped }))),
    ];
    let said = said_in(&honest_run(3).heard);
    seeds.extend(["ready", "second", "measured", "computed", "holds", "applied"].into_iter().zip(said));
    seeds
}

/// Bodies of messages in an input of a room, one of each length.
fn said_in(mut input: &[u8]) -> Vec<Vec<u8>> {
    input = &input[1..];
    let mut bodies: Vec<Vec<u8>> = Vec::new();
    while let Some((&[_, low, high], rest)) = input.split_first_chunk() {
        let (body, rest) = rest.split_at(usize::from(u16::from_le_bytes([low, high])));
        if !body.is_empty() && !bodies.iter().any(|known| known.len() == body.len()) {
            bodies.push(body.to_vec());
        }
        input = rest;
    }
    bodies
}

pub(crate) fn chunk_messages() -> Seeds {
    // Key, index, offset, pace: as `ChunkRequest` has them.
    let key = |key: BlobKey| body(&(key, 3_u64, 7_u32, 0_u64));
    let delta = BlobKey::Delta { round: Round(9), fragment: 1, site: SiteId(2) };
    let blob = unfinished();
    let (reply, _) = answered(&blob, 1);
    vec![("file", key(BlobKey::File { name: "tokenizer.json".to_owned() })), ("delta", key(delta)), ("reply", reply)]
}

fn answered(blob: &wire::Blob, index: u64) -> (Vec<u8>, Vec<u8>) {
    // Memory is not waited for.
    let mut answer = Box::pin(fuzzing::answered_chunk(blob, index));
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match answer.as_mut().poll(&mut context) {
        std::task::Poll::Ready(answer) => answer.expect("memory can be read"),
        std::task::Poll::Pending => panic!("a blob in memory is there at once"),
    }
}

pub(crate) fn chunk_answers() -> Seeds {
    let (reply, content) = answered(&wire::Blob::memory(b"a delta".to_vec()), 0);
    let right = [&[reply.len() as u8][..], &reply, &content].concat();
    let (reply, content) = answered(&wire::Blob::memory(b"another".to_vec()), 0);
    vec![("right", right), ("another", [&[reply.len() as u8][..], &reply, &content].concat())]
}

pub(crate) fn probe_messages() -> Seeds {
    let greeting = ProbeGreeting {
        run: "run".to_owned(),
        secret: Some(secret()),
        kind: ProbeKind::Stream,
        version: "0.1.0".to_owned(),
    };
    // Variants of the answers, by their numbers.
    let vector = body(&(4_u32, "matmul", vec![1.0_f32, 2.0, 3.0]));
    vec![("greeting", body(&greeting)), ("ping", vec![0]), ("vector", vector), ("pong", body(&(2_u32, 5_u64)))]
}

pub(crate) fn blob_name() -> Seeds {
    texts(&[
        ("plain", "data/train-00000.tokens"),
        ("up", "../identity.pem"),
        ("root", "/etc/passwd"),
        ("drive", "c:\\x"),
    ])
}

pub(crate) fn invite() -> Seeds {
    let word =
        |address: &str| Invite::new(address, "my-run_1", hash(), secret()).expect("it is an address").to_string();
    vec![("name", word("beringia.example:4520").into_bytes()), ("ipv6", word("[::1]:1").into_bytes())]
}

pub(crate) fn proxy() -> Seeds {
    texts(&[("host", "socks5://proxy.example:1080"), ("ipv6", "socks5://[::1]:1080/"), ("user", "socks5://me@h:1")])
}

pub(crate) fn identity() -> Seeds {
    vec![("file", fuzzing::identity_file().expect("a key can be made"))]
}

pub(crate) fn unpacked() -> Seeds {
    let tokens: Vec<u8> = (0..4_000_u32).flat_map(|i| (((i * i) >> 7) as u16 % 300).to_le_bytes()).collect();
    let packed = wire::packed::pack(&tokens).expect("tokens shrink");
    let length = &(tokens.len() as u32).to_le_bytes()[..3];
    vec![("tokens", [length, &packed].concat()), ("short", [&[1, 0, 0], &packed[..]].concat())]
}

pub(crate) fn partial_file() -> Seeds {
    let blob = unfinished();
    let header = [&blob.hash().expect("memory can be read").0[..], &blob.bytes().to_le_bytes()].concat();
    let record = |index: u64| {
        let (reply, _) = answered(&blob, index);
        // The hash lies behind the variant and two numbers of three bytes; the option after it is the last byte.
        [&index.to_le_bytes()[..], &reply[reply.len() - 33..reply.len() - 1]].concat()
    };
    let journal = [header, record(1), record(0)].concat();
    vec![("whole", [&[0xff][..], &journal].concat()), ("damaged", [&[7][..], &journal].concat())]
}

pub(crate) fn object_name() -> Seeds {
    let delta = objects::ObjectKey::Delta { round: Round(12), fragment: 1, site: SiteId(3) };
    let state = objects::ObjectKey::State { round: Round(12) };
    vec![("delta", delta.name(hash()).into_bytes()), ("state", state.name(hash()).into_bytes())]
}

/// Some values of different magnitudes and signs.
fn values(count: usize) -> Vec<f32> {
    (0..count).map(|index| ((index * 7_919) % 1_009) as f32 / 300.0 - 1.7).collect()
}

fn encoded_by(kinds: &[CodecKind], names: &[&'static str], count: usize) -> Seeds {
    let encode = |(index, kind): (usize, &CodecKind)| {
        let (codec, mut values) = (kind.codec(), values(count));
        let mut encoded = vec![0; codec.encoded_bytes(count)];
        codec.encode(&mut values, &mut encoded);
        (names[index], [&[index as u8][..], &encoded].concat())
    };
    kinds.iter().enumerate().map(encode).collect()
}

pub(crate) fn block_codecs() -> Seeds {
    let kinds = [CodecKind::F32, CodecKind::Bf16, CodecKind::Int8, CodecKind::Mxfp4, CodecKind::E3m0];
    encoded_by(&kinds, &["f32", "bf16", "int8", "mxfp4", "e3m0"], 300)
}

pub(crate) fn sparse_codecs() -> Seeds {
    encoded_by(&[CodecKind::Sparse, CodecKind::Sparse96], &["sparse", "sparse96"], 5_000)
}

pub(crate) fn low_rank() -> Seeds {
    let shapes = [(24, 40), (1, 33), (67, 19), (64, 64)].map(|(rows, columns)| MatrixShape { rows, columns });
    let codec = LowRank::new(&shapes, 2);
    let mut values = values(shapes.iter().map(|shape| shape.values()).sum());
    let (mut basis, mut encoded) = (codec.basis(1), vec![0; codec.encoded_bytes()]);
    codec.begin(&mut basis, &mut encoded);
    for (index, place) in codec.matrices().enumerate() {
        codec.encode_matrix(index, &mut values[place], &mut basis, &mut encoded);
    }
    vec![("rank-2", [&[1][..], &encoded].concat())]
}

pub(crate) fn fragment_delta() -> Seeds {
    let names = ["f32", "bf16", "int8", "mxfp4", "e3m0", "lowrank", "sparse96", "sparse"];
    let encode = |(name, index): (&'static str, u8)| {
        let (codec, count) = fragment_codec(index);
        let delta = codec.encode(&mut values(count), &mut rounds::EncoderMemory::default());
        (name, [&[index][..], &delta].concat())
    };
    assert_eq!(names.len(), CODECS.len());
    names.into_iter().zip(0..).map(encode).collect()
}

pub(crate) fn tensors() -> Seeds {
    let terabyte = r#"{"x":{"dtype":"F32","shape":[274877906944],"data_offsets":[0,1099511627776]}}"#;
    let claimed = [&(terabyte.len() as u64).to_le_bytes()[..], terabyte.as_bytes()].concat();
    vec![("model", checkpoints::MODEL.clone()), ("terabyte", claimed)]
}

pub(crate) fn checkpoint_manifest() -> Seeds {
    let file = |name: &str, content: &[u8]| serde_json::json!({ "name": name, "bytes": content.len(), "blake3": ContentHash::of(content) });
    let files = [file("model.safetensors", &checkpoints::MODEL), file("state.json", checkpoints::STATE)];
    let manifest = |files: &[serde_json::Value]| {
        let manifest = serde_json::json!({
            "format": "beringia-checkpoint", "version": 1, "round": 12, "files": files,
        });
        manifest.to_string().into_bytes()
    };
    vec![("whole", manifest(&files)), ("outside", manifest(&[file("../state.json", checkpoints::STATE)]))]
}

pub(crate) fn hugging_face_config() -> Seeds {
    vec![("llama", checkpoints::CONFIG.clone())]
}

pub(crate) fn hugging_face_index() -> Seeds {
    let schema = crate::codecs::schema();
    let entries = schema.parameters().iter().map(|parameter| (parameter.name.clone(), "model-1.safetensors".into()));
    let map: serde_json::Map<String, serde_json::Value> = entries.collect();
    let index = serde_json::json!({ "metadata": { "total_size": 1 }, "weight_map": map });
    let outside = serde_json::json!({ "weight_map": { "x": "../model-1.safetensors" } });
    vec![("one-shard", index.to_string().into_bytes()), ("outside", outside.to_string().into_bytes())]
}

pub(crate) fn hugging_face_weights() -> Seeds {
    vec![("llama", checkpoints::WEIGHTS.clone())]
}

pub(crate) fn data_manifest() -> Seeds {
    vec![("prepared", datasets::prepared_manifest().to_json())]
}

pub(crate) fn shard_file() -> Seeds {
    let manifest = datasets::prepared_manifest();
    let shard = &manifest.train.shards[0];
    let read = |first: u8, name: &str| [&[first][..], datasets::prepared(name)].concat();
    vec![("tokens", read(0, &shard.token_file.name)), ("documents", read(1, &shard.document_file.name))]
}

pub(crate) fn tokenizer() -> Seeds {
    let trained = datasets::prepared(data::manifest::TOKENIZER_FILE).to_vec();
    let tiny = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[{"id":2,"content":"<|endoftext|>",
"single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}],"normalizer":null,
"pre_tokenizer":{"type":"Whitespace"},"post_processor":null,"decoder":null,
"model":{"type":"WordLevel","vocab":{"a":0,"b":1,"<|endoftext|>":2},"unk_token":"a"}}"#;
    vec![("trained", trained), ("words", tiny.as_bytes().to_vec())]
}

pub(crate) fn text_file() -> Seeds {
    texts(&[("lines", "one\ntwo\nthree\n"), ("mark", "\u{feff}Ü 日本\n"), ("binary", "text\0text")])
}

pub(crate) fn json_lines() -> Seeds {
    texts(&[
        ("text", "{\"text\":\"one\\n\\u00fc\"}\n\n{\"content\":\"two\",\"id\":3}\n{\"text\":5}\n[1]\n{"),
        ("deep", &format!("{{\"x\":{},\"text\":\"y\"}}\n", "[".repeat(200))),
    ])
}

pub(crate) fn parquet_file() -> Seeds {
    vec![("plain", parquet(Compression::UNCOMPRESSED)), ("snappy", parquet(Compression::SNAPPY))]
}

/// Two row groups of an optional text column.
fn parquet(compression: Compression) -> Vec<u8> {
    let schema = parse_message_type("message m { OPTIONAL BYTE_ARRAY text (UTF8); }").expect("it is a schema");
    let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
    let mut writer =
        SerializedFileWriter::new(Vec::new(), Arc::new(schema), properties).expect("memory can be written");
    for group in 0..2 {
        let mut rows = writer.next_row_group().expect("a group can be begun");
        let mut column = rows.next_column().expect("there is a column").expect("there is a column");
        let levels: Vec<i16> = (0..12).map(|row| i16::from(row % 3 != 0)).collect();
        let texts: Vec<ByteArray> =
            (0..8).map(|row| ByteArray::from(format!("group {group} row {row}").as_str())).collect();
        column.typed::<ByteArrayType>().write_batch(&texts, Some(&levels), None).expect("memory can be written");
        column.close().expect("memory can be written");
        rows.close().expect("memory can be written");
    }
    writer.into_inner().expect("memory can be written")
}

fn config() -> RunConfig {
    RunConfig::new("run", crate::codecs::shape())
}

pub(crate) fn run_toml() -> Seeds {
    let other = r#"[transformers]
config = "{\"model_type\":\"gpt2\"}"
parameters = ["transformer.wte.weight 512 x 64", "transformer.ln_f.weight 64"]
"#;
    let text = config().to_toml();
    vec![("llama", text.clone().into_bytes()), ("transformers", format!("{text}\n{other}").into_bytes())]
}

pub(crate) fn coordinator_hears() -> Seeds {
    let names = ["mesh", "sharded", "streaming", "adaptive"];
    let honest = names.into_iter().zip(0..).map(|(name, kind)| (name, honest_run(kind).heard));
    let ready = |tokens_per_second| {
        FromSite::Report(Report::Ready {
            round: Round(0),
            state_hash: ContentHash([7; 32]),
            tokens_per_second,
            recall: 0,
        })
    };
    let fetched = FromSite::Fetched { round: Round(1), from: SiteId(1), bytes: 1, seconds: f64::NAN };
    // The sum of the speeds, by which work is divided, was infinite.
    let speed = said_to_coordinator(0, &[ready(1e308), ready(1e308)]);
    // The event's line in the log could not be read again.
    let seconds = said_to_coordinator(0, &[ready(100.0), ready(200.0), fetched]);
    honest.chain([("found-speed", speed), ("found-seconds", seconds)]).collect()
}

pub(crate) fn site_hears() -> Seeds {
    let names = ["mesh", "sharded", "streaming", "adaptive"];
    let honest = names.into_iter().zip(0..).map(|(name, kind)| (name, honest_run(kind).told));
    let commit = rounds::Commit { round: Round(u64::MAX), ..rounds::Commit::initial() };
    // The site counted on from that round, for ever.
    let fetch = Directive::FetchState { commit: commit.into(), state_hash: hash(), from: [SiteId(1)].into() };
    let round = said_to_site(0, &[fetch]);
    honest.chain([("found-round", round)]).collect()
}

pub(crate) fn log_lines() -> Seeds {
    let committed = rounds::coordinator::Committed {
        commit: rounds::Commit::initial(),
        ledger: rounds::Ledger::default(),
        state_hash: Some(hash()),
    };
    let decisions = [Decision::TermStarted { term: Term(4) }, Decision::Committed(Box::new(committed))];
    let lines = LINES.iter().cloned().chain(decisions.map(coordinator::Line::Decision));
    let mut text = Vec::new();
    for line in lines {
        serde_json::to_writer(&mut text, &line).expect("a line is JSON");
        text.push(b'\n');
    }
    vec![("few", text)]
}

pub(crate) fn log_database() -> Seeds {
    let length = (DATABASE.len() as u32).to_le_bytes().to_vec();
    let half = (DATABASE.len() as u32 / 2).to_le_bytes().to_vec();
    let header = [&length[..], &[9, 0, 0, 0, 1]].concat();
    vec![("whole", length), ("half", half), ("header", header)]
}

pub(crate) fn access_files() -> Seeds {
    let door = coordinator::Door { address: "h:1".to_owned(), run: "run".to_owned(), fingerprint: hash() };
    let member = coordinator::Member {
        site: SiteId(0),
        name: "site-a".to_owned(),
        fingerprint: hash(),
        connected: true,
        revoked: false,
    };
    let json = |value: serde_json::Result<Vec<u8>>| value.expect("it is JSON");
    vec![
        ("door", json(serde_json::to_vec(&door))),
        ("members", json(serde_json::to_vec(&[member]))),
        ("invite", b"{\"ends_unix_seconds\":5}".to_vec()),
    ]
}

pub(crate) fn event_log() -> Seeds {
    let events = honest_run(2).events.into_iter();
    let record = |(event, seq)| Record { v: 1, seq, unix_ms: 1_000 * seq, source: "coordinator".to_owned(), event };
    let text: String = events.zip(0..).map(record).map(|record| record.to_line()).collect();
    let torn = text.as_bytes()[..text.len() * 2 / 3].to_vec();
    vec![("run", text.into_bytes()), ("torn", torn)]
}

pub(crate) fn cluster() -> Seeds {
    texts(&[(
        "two",
        "[[site]]\nname = \"oslo\"\ndevice = \"H100\"\ndevices = 512\n[[site]]\nname = \"lyon\"\ndevice = \"A100\"\n\
         devices = 64\npower_w_per_device = 500\n[[link]]\nbetween = [\"lyon\", \"oslo\"]\ngbit_s = 10\n\
         [link_default]\ngbit_s = 1\nround_trip_ms = 20\nloss_percent = 0.01\n",
    )])
}

pub(crate) fn device_catalogue() -> Seeds {
    texts(&[(
        "own",
        "[[device]]\nname = \"H100\"\nmemory_gib = 94\n[[device]]\nname = \"Own 1\"\naliases = [\"own\"]\n\
         bf16_tflops = 100\nmemory_gib = 32\nmemory_gb_s = 900\n",
    )])
}

pub(crate) fn layout_table() -> Seeds {
    texts(&[
        ("short", "device,layers,hidden\nA100,32,4096\n"),
        (
            "full",
            "device,layers,hidden,ffn,heads,kv_heads,vocab,seq,global_batch,micro_batch,tp,pp,dp,zero,recompute,\
             precision,gpus_per_node,interconnect_gbit_s\nA100,32,4096,16384,32,32,51200,2048,1,1,1,1,1,1,none,bf16,8,200\n\
             \"H100\",80,8192,28672,64,8,128256,8192,128,1,4,4,4,1,none,fp8,8,400\n",
        ),
    ])
}

pub(crate) fn command_texts() -> Seeds {
    texts(&[
        ("count", "1.4T"),
        ("model", "llama-70b"),
        ("site", "site=oslo"),
        ("link", "link=oslo,lyon+1.5"),
        ("device", "device=lyon:H20"),
    ])
}

pub(crate) fn torch_answers() -> Seeds {
    texts(&[
        ("hello", r#"{"protocol":1,"python":"3.11","torch":"2.1","rank_count":1}"#),
        ("step", r#"{"loss_nats":3.5,"tokens":128,"gradient_norm":0.5,"seconds":0.1,"joules":null}"#),
        ("not-finite", r#"{"error":{"kind":"not_finite","what":"loss","value":"NaN"}}"#),
        (
            "initialised",
            r#"{"device":{"name":"cpu","maker":"","driver":"","memory_bytes":null,"threads":2,"precision":"f32"},
"parameters":[["model.embed_tokens.weight",[32,16]]]}"#,
        ),
    ])
}
