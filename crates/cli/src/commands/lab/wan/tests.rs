//! The lab's network over loopback sockets, as sites use it.

use super::*;
use std::net::Ipv4Addr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_socks::tcp::Socks5Stream;

const SITES: [&str; 2] = ["site-a", "site-b"];

/// Ends a test that would hang. Nothing is measured with it.
async fn bounded<T>(test: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), test).await.expect("the test hangs")
}

/// A network of two sites with the relay of the first; its address, and a port that nobody measures at.
async fn network(link: &str) -> (Arc<Network>, SocketAddr) {
    let links = Links::uniform(link, &SITES.map(str::to_owned)).unwrap();
    let network = Arc::new(Network::new(&links, 1, 0));
    let listener = relay::listen().unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(relay::serve(Arc::clone(&network), 0, listener));
    (network, address)
}

/// Sends back what it gets, to everybody.
async fn echo() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                let _ended = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    port
}

async fn dial(relay: SocketAddr, name: &str, port: u16) -> Result<TcpStream, tokio_socks::Error> {
    Socks5Stream::connect(relay, (name, port)).await.map(Socks5Stream::into_inner)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_carries_bytes_both_ways_and_counts_them() {
    bounded(async {
        let (network, relay) = network("400Mbit/s,2ms,1ms").await;
        let content: Vec<u8> = (0..1_000_000u32).map(|index| (index * 7 / 3) as u8).collect();
        let stream = dial(relay, "site-b", echo().await).await.unwrap();
        let (mut read, mut write) = stream.into_split();
        let sent = content.clone();
        let sending = tokio::spawn(async move {
            write.write_all(&sent).await.unwrap();
            write.shutdown().await.unwrap();
        });
        let mut received = Vec::new();
        read.read_to_end(&mut received).await.unwrap();
        sending.await.unwrap();
        assert!(received == content, "{} bytes came back", received.len());
        for (from, to) in [(0, 1), (1, 0)] {
            let carried = network.link(from, to).carried();
            assert_eq!((carried.bytes, carried.connections, carried.broken), (1_000_000, 1, 0));
        }
        assert_eq!(network.link(0, 2).carried().bytes, 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_leads_to_the_ends_of_the_lab_and_nowhere_else() {
    bounded(async {
        let (_network, relay) = network("400Mbit/s").await;
        let port = echo().await;
        for name in ["site-b", COORDINATOR] {
            dial(relay, name, port).await.unwrap();
        }
        for name in ["site-a", "site-c", "127.0.0.1", "localhost"] {
            let refused = dial(relay, name, port).await;
            assert!(matches!(refused, Err(tokio_socks::Error::ConnectionNotAllowedByRuleset)), "{name}: {refused:?}");
        }
        let gone = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap().local_addr().unwrap().port();
        let refused = dial(relay, "site-b", gone).await;
        assert!(matches!(refused, Err(tokio_socks::Error::ConnectionRefused)), "{refused:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_connection_is_a_reset_and_the_next_one_works() {
    bounded(async {
        let (network, relay) = network("400Mbit/s,1ms,50%").await;
        let port = echo().await;
        for broken in 1..=3u64 {
            let stream = dial(relay, "site-b", port).await.unwrap();
            let (mut read, mut write) = stream.into_split();
            let sending = tokio::spawn(async move {
                loop {
                    if let Err(error) = write.write_all(&[1; 10_000]).await {
                        break error.kind();
                    }
                }
            });
            let receiving = async {
                loop {
                    match read.read(&mut [0; 10_000]).await {
                        Ok(0) => break None,
                        Ok(_) => {}
                        Err(error) => break Some(error.kind()),
                    }
                }
            };
            // The system tells it once: to whoever asks first.
            let told = [receiving.await, Some(sending.await.unwrap())];
            assert!(told.contains(&Some(io::ErrorKind::ConnectionReset)), "{told:?}");
            let both = [(0, 1), (1, 0)].map(|(from, to)| network.link(from, to).carried().broken);
            assert!((broken..=2 * broken).contains(&both.iter().sum::<u64>()), "{both:?}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_is_silence_and_what_was_said_meanwhile_arrives_after_it() {
    bounded(async {
        let (network, relay) = network("400Mbit/s").await;
        let port = echo().await;
        let mut stream = dial(relay, "site-b", port).await.unwrap();
        let mut answer = [0; 4];
        stream.write_all(b"here").await.unwrap();
        stream.read_exact(&mut answer).await.unwrap();
        network.link(0, 1).set_cut(true);
        stream.write_all(b"gone").await.unwrap();
        // A connection wants both ways: this one waits, and gives up without a word at the other end.
        let dialling = tokio::time::timeout(Duration::from_millis(50), dial(relay, "site-b", port)).await;
        assert!(dialling.is_err(), "nobody answers over a link that is cut");
        let early = tokio::time::timeout(Duration::from_millis(50), stream.read_exact(&mut answer)).await;
        assert!(early.is_err(), "nothing arrives over a link that is cut");
        assert_eq!(network.link(0, 1).carried().connections, 1);
        network.link(0, 1).set_cut(false);
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"gone", "the connection goes on");
        dial(relay, "site-b", port).await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_of_one_direction_leaves_the_other() {
    bounded(async {
        let (network, relay) = network("400Mbit/s").await;
        let mut stream = dial(relay, "site-b", echo().await).await.unwrap();
        network.link(1, 0).set_cut(true);
        stream.write_all(b"heard").await.unwrap();
        while network.link(0, 1).carried().bytes < 5 {
            tokio::task::yield_now().await;
        }
        let mut answer = [0; 5];
        let early = tokio::time::timeout(Duration::from_millis(50), stream.read_exact(&mut answer)).await;
        assert!(early.is_err(), "the answer does not come");
        network.link(1, 0).set_cut(false);
        stream.read_exact(&mut answer).await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sender_feels_the_link_and_not_the_memory_before_it() {
    bounded(async {
        let (_network, relay) = network("1kbit/s").await;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let stream = dial(relay, "site-b", listener.local_addr().unwrap().port()).await.unwrap();
        let mut taken = 0;
        while let Ok(bytes) = stream.try_write(&[1; 10_000]) {
            taken += bytes;
        }
        assert!(taken < 1 << 20, "{taken} bytes were taken at once");
    })
    .await;
}

#[test]
fn the_report_states_what_each_direction_gave() {
    let text = "default = \"400Mbit/s,4ms\"\n[links]\n\"site-a -> site-b\" = \"100Mbit/s,8ms,1%\"\n";
    let links = Links::from_toml(text, &SITES.map(str::to_owned)).unwrap();
    let wan = Wan::start(&links, 1).unwrap();
    assert!(wan.proxy(1).starts_with("socks5://127.0.0.1:"));
    let report = wan.report();
    let wanted: Vec<_> = report
        .iter()
        .map(|link| {
            format!("{}>{} {} {:.4}", link.from, link.to, link.wanted_bits_per_second, link.wanted_round_trip_seconds)
        })
        .collect();
    let expected = [
        "site-a>site-b 100000000 0.0060",
        "site-b>site-a 400000000 0.0060",
        "site-a>coordinator 400000000 0.0040",
        "coordinator>site-a 400000000 0.0040",
        "site-b>coordinator 400000000 0.0040",
        "coordinator>site-b 400000000 0.0040",
    ];
    assert_eq!(wanted, expected);
    for link in &report {
        assert!(link.measured_round_trip_seconds >= link.wanted_round_trip_seconds, "{link:?}");
        assert!(link.measured_bits_per_second > 0.0, "{link:?}");
        assert_eq!((link.bytes, link.connections, link.connections_broken), (0, 0, 0), "nothing of the sites' yet");
    }
}

#[test]
fn a_line_of_the_report_says_it_in_words() {
    let mut link = LinkReport {
        from: "site-a".to_owned(),
        to: "site-b".to_owned(),
        wanted_bits_per_second: 20_000_000,
        measured_bits_per_second: 19_834_000.0,
        wanted_round_trip_seconds: 0.05,
        measured_round_trip_seconds: 0.0504,
        jitter_seconds: 0.0,
        loss: 0.001,
        connections: 40,
        connections_broken: 3,
        bytes: 41_234_567,
        busy_seconds: 16.5,
    };
    let expected =
        "link       site-a -> site-b: 20 Mbit/s wanted, 19.8 measured; 50.4 ms; 3 connections broken; 41.2 MB carried";
    assert_eq!(link.line(), expected);
    (link.connections_broken, link.wanted_bits_per_second, link.measured_bits_per_second) = (0, 1_500_000_000, 987.0);
    assert!(link.line().contains(": 1500 Mbit/s wanted, 0.000987 measured; 50.4 ms; 41.2 MB"), "{}", link.line());
}
