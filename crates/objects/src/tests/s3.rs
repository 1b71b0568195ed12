//! On a server of S3: PyPI's `moto[server]`, started for the test by the interpreter in `BERINGIA_PYTHON`, else `python3`.
//! Where it is missing the test says so on stderr and passes; in CI it fails. And on a server that answers in bad faith.

use super::*;
use crate::PutError;
use base::Hint;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;

/// Python and moto are up within seconds even on a machine that is busy with other tests.
const START: Duration = Duration::from_secs(60);

const RUNNING: &str = "Running on http://";

fn python() -> PathBuf {
    std::env::var_os("BERINGIA_PYTHON").map_or_else(|| PathBuf::from("python3"), PathBuf::from)
}

fn has_moto() -> bool {
    let find = "import sys, importlib.util as u; sys.exit(not (u.find_spec('moto') and u.find_spec('flask_cors')))";
    let found = Command::new(python()).args(["-c", find]).stdin(Stdio::null()).stderr(Stdio::null()).status();
    let found = found.is_ok_and(|status| status.success());
    let missing = format!("{} has no moto: pip install 'moto[server]'", python().display());
    assert!(found || std::env::var_os("CI").is_none(), "{missing}");
    if !found {
        eprintln!("left out: {missing}");
    }
    found
}

/// A server of S3 that ends with the test.
struct Moto {
    child: Child,
    address: SocketAddr,
}

impl Moto {
    /// The system chooses the port, and the server's own log tells it.
    fn start() -> Self {
        let mut command = Command::new(python());
        command.args(["-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]).stdin(Stdio::null());
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        let (found, address) = mpsc::channel();
        // Reads on to the end, so that the server never waits for its log to be read.
        std::thread::spawn(move || {
            for line in log.lines().map_while(Result::ok) {
                if let Some((_, address)) = line.split_once(RUNNING) {
                    let _ = found.send(address.trim().to_owned());
                }
            }
        });
        let address = address.recv_timeout(START);
        let mut moto = Self { child, address: SocketAddr::from(([127, 0, 0, 1], 0)) };
        moto.address = address.expect("moto names its port").parse().unwrap();
        moto
    }

    fn make_bucket(&self, name: &str) {
        let mut stream = TcpStream::connect(self.address).unwrap();
        let host = self.address;
        write!(stream, "PUT /{name} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn open(address: SocketAddr, url: &str, run: &str) -> ObjectStore {
    let settings = [
        ("AWS_ENDPOINT_URL", format!("http://{address}")),
        ("AWS_ACCESS_KEY_ID", "key".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "very-secret".to_owned()),
        ("AWS_SESSION_TOKEN", "very-secret-too".to_owned()),
        ("AWS_REGION", "us-east-1".to_owned()),
    ];
    ObjectStore::open_with(url, run, settings.map(|(name, value)| (name.to_owned(), value))).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bucket_does_as_a_folder_does() {
    if !has_moto() {
        return;
    }
    let moto = Moto::start();
    moto.make_bucket("deltas");
    round_trips(&open(moto.address, "s3://deltas/some/prefix", "run-1")).await;
    everyone_at_once(&open(moto.address, "s3://deltas", "run-2"), 4).await;
    forgets(&open(moto.address, "s3://deltas/some/prefix", "run-3")).await;
    // Runs do not see each other, nor do prefixes.
    assert!(!is_there(&open(moto.address, "s3://deltas", "run-3"), delta(3, 1)).await);
    assert!(is_there(&open(moto.address, "s3://deltas/some/prefix", "run-3"), delta(3, 1)).await);

    let error = open(moto.address, "s3://missing", "run-1").put(&delta(1, 1), content(10, 1)).await.unwrap_err();
    assert!(matches!(error, PutError::Failed { .. }), "{error}");
    assert!(error.to_string().ends_with("404 Not Found (NoSuchBucket)"), "{error}");
}

/// Answers every request with `answer` and closes.
fn serve(answer: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let mut reader = BufReader::new(&stream);
            let mut line = String::new();
            while reader.read_line(&mut line).is_ok_and(|bytes| bytes > 2) {
                line.clear();
            }
            // A client that has read enough goes away.
            let _ = (&stream).write_all(answer.as_bytes());
        }
    });
    address
}

#[tokio::test]
async fn a_refusal_is_told_without_what_the_server_repeats() {
    let address = serve(
        "HTTP/1.1 403 Forbidden\r\nContent-Length: 95\r\nConnection: close\r\n\r\n\
         <Error><Code>SignatureDoesNotMatch</Code><CanonicalRequest>very-secret-too</CanonicalRequest>  ",
    );
    let store = open(address, "s3://deltas", "run");
    let put = store.put(&delta(1, 1), Bytes::new()).await.unwrap_err();
    assert!(matches!(put, PutError::Refused { .. }), "{put}");
    assert!(put.to_string().ends_with("403 Forbidden (SignatureDoesNotMatch)"), "{put}");
    assert!(put.hint().unwrap().contains("AWS_SECRET_ACCESS_KEY"));
    let get = store.get(&delta(1, 1), 1, ContentHash::of(b"x"), PATIENCE).await.unwrap_err();
    assert!(matches!(get, GetError::Refused { .. }), "{get}");
    let forget = store.forget_before(Round(1), SiteId(1)).await.unwrap_err();
    let printed = format!("{put} {put:?} {get} {get:?} {forget} {forget:?}");
    assert!(!printed.contains("very-secret"), "{printed}");
}

#[tokio::test]
async fn a_server_that_sends_another_part_than_was_asked_for_is_not_believed() {
    let address = serve(
        "HTTP/1.1 206 Partial Content\r\nContent-Length: 4\r\nContent-Range: bytes 0-9999999/10000000\r\n\
         Last-Modified: Sun, 22 Nov 2026 15:00:00 GMT\r\nETag: \"1\"\r\nConnection: close\r\n\r\nevil",
    );
    let store = open(address, "s3://deltas", "run");
    let error = store.get(&delta(1, 1), 4, ContentHash::of(b"good"), PATIENCE).await.unwrap_err();
    assert!(matches!(error, GetError::Failed { .. }), "{error}");
}
