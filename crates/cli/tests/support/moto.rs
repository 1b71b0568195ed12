//! A server of S3 for a test: PyPI's `moto[server]`.

use crate::needs::{left_out, python};
use crate::support::PATIENCE;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;

/// What nobody may find anywhere.
pub(crate) const SECRET: &str = "very-secret-key";

/// Whether moto is missing.
pub(crate) fn no_moto() -> bool {
    let find = "import sys, importlib.util as u; sys.exit(not (u.find_spec('moto') and u.find_spec('flask_cors')))";
    let found = Command::new(python()).args(["-c", find]).stdin(Stdio::null()).stderr(Stdio::null()).status();
    !found.is_ok_and(|status| status.success()) && left_out(&format!("{} has no moto[server]", python().display()))
}

/// It ends with the test.
pub(crate) struct Moto {
    child: Child,
    address: String,
}

impl Moto {
    /// The system chooses the port, and the server's own log tells it.
    pub(crate) fn start() -> Self {
        let mut command = Command::new(python());
        command.args(["-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]).stdin(Stdio::null());
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        let (found, address) = mpsc::channel();
        // Reads on to the end, so that the server never waits for its log to be read.
        std::thread::spawn(move || {
            for line in log.lines().map_while(Result::ok) {
                if let Some((_, address)) = line.split_once("Running on http://") {
                    let _ = found.send(address.trim().to_owned());
                }
            }
        });
        let mut moto = Self { child, address: String::new() };
        moto.address = address.recv_timeout(PATIENCE).unwrap();
        moto
    }

    pub(crate) fn make_bucket(&self, name: &str) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let head = format!("PUT /{name} HTTP/1.1\r\nHost: {}", self.address);
        write!(stream, "{head}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }

    /// The environment of whoever uses it.
    pub(crate) fn environment(&self) -> [(&'static str, String); 4] {
        [
            ("AWS_ENDPOINT_URL", format!("http://{}", self.address)),
            ("AWS_ACCESS_KEY_ID", "key".to_owned()),
            ("AWS_SECRET_ACCESS_KEY", SECRET.to_owned()),
            ("AWS_REGION", "us-east-1".to_owned()),
        ]
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _gone = self.child.wait();
    }
}
