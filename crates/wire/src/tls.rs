//! TLS 1.3, mutual, by pinned self-signed certificates; rustls with ring, nothing of the web's authorities.
//!
//! The client accepts exactly the certificate whose fingerprint it was told. The server accepts any self-signed
//! certificate whose key the client proves to hold, and reports its fingerprint: who may join is the application's
//! decision. Sessions are never resumed, so that every connection proves possession anew.

use crate::limits::CERTIFICATE_BYTES_MAX;
use base::ContentHash;
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::NoServerSessionStorage;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, OtherError, PeerIncompatible,
    ServerConfig, SignatureScheme, version::TLS13,
};
use std::sync::Arc;

/// In every certificate and never compared: TLS wants some name.
pub(crate) const SERVER_NAME: &str = "beringia";

/// The server has another certificate than the one expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the peer's certificate has fingerprint {found}, expected was {expected}")]
pub(crate) struct FingerprintMismatch {
    pub(crate) expected: ContentHash,
    pub(crate) found: ContentHash,
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// Unpredictable bytes from the TLS library's generator.
pub(crate) fn random_bytes<const N: usize>() -> Result<[u8; N], rustls::crypto::GetRandomFailed> {
    let mut bytes = [0; N];
    ring::default_provider().secure_random.fill(&mut bytes)?;
    Ok(bytes)
}

pub(crate) fn server_config(
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
) -> Result<Arc<ServerConfig>, Error> {
    let provider = provider();
    let verifier = AnySelfSigned { algorithms: provider.signature_verification_algorithms };
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_single_cert(vec![certificate], key)?;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// A client's configuration up to the server it expects.
#[derive(Clone)]
pub(crate) struct ClientTemplate {
    config: ClientConfig,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ClientTemplate {
    pub(crate) fn new(certificate: CertificateDer<'static>, key: PrivateKeyDer<'static>) -> Result<Self, Error> {
        let provider = provider();
        let algorithms = provider.signature_verification_algorithms;
        // The verifier is replaced before each use; this one accepts no certificate that exists.
        let nobody = PinnedServer { expected: ContentHash::default(), algorithms };
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(nobody))
            .with_client_auth_cert(vec![certificate], key)?;
        config.resumption = Resumption::disabled();
        config.enable_sni = false;
        Ok(Self { config, algorithms })
    }

    pub(crate) fn pinned_to(&self, expected: ContentHash) -> Arc<ClientConfig> {
        let mut config = self.config.clone();
        let verifier = PinnedServer { expected, algorithms: self.algorithms };
        config.dangerous().set_certificate_verifier(Arc::new(verifier));
        Arc::new(config)
    }
}

fn refuse_unusual(certificate: &CertificateDer<'_>, chain: &[CertificateDer<'_>]) -> Result<(), Error> {
    match certificate.len() <= CERTIFICATE_BYTES_MAX && chain.is_empty() {
        true => Ok(()),
        false => Err(Error::InvalidCertificate(CertificateError::BadEncoding)),
    }
}

fn no_tls12<T>() -> Result<T, Error> {
    Err(Error::PeerIncompatible(PeerIncompatible::Tls12NotOfferedOrEnabled))
}

#[derive(Debug)]
struct PinnedServer {
    expected: ContentHash,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for PinnedServer {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        refuse_unusual(certificate, chain)?;
        let found = ContentHash::of(certificate);
        if found != self.expected {
            let mismatch = FingerprintMismatch { expected: self.expected, found };
            return Err(Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(mismatch)))));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[derive(Debug)]
struct AnySelfSigned {
    algorithms: WebPkiSupportedAlgorithms,
}

impl ClientCertVerifier for AnySelfSigned {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        refuse_unusual(certificate, chain)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::pki_types::PrivatePkcs8KeyDer;
    use rustls::sign::{CertifiedKey, SingleCertAndKey};
    use rustls::{ClientConnection, ServerConnection, version::TLS12};
    use std::io::{Read, Write};

    type Pair = (CertificateDer<'static>, PrivateKeyDer<'static>);

    fn pair() -> Pair {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let certificate = rcgen::CertificateParams::new([SERVER_NAME.to_owned()]).unwrap().self_signed(&key).unwrap();
        (certificate.der().clone(), PrivatePkcs8KeyDer::from(key.serialize_der()).into())
    }

    /// The certificate of one with the key of another, past rustls's own check that they belong together.
    fn stolen(certificate: &Pair, key: &Pair) -> Arc<SingleCertAndKey> {
        let key = ring::sign::any_supported_type(&key.1).unwrap();
        Arc::new(SingleCertAndKey::from(CertifiedKey::new(vec![certificate.0.clone()], key)))
    }

    fn server(of: &Pair) -> Arc<ServerConfig> {
        server_config(of.0.clone(), of.1.clone_key()).unwrap()
    }

    fn client(of: &Pair, expected: &Pair) -> Arc<ClientConfig> {
        let template = ClientTemplate::new(of.0.clone(), of.1.clone_key()).unwrap();
        template.pinned_to(ContentHash::of(&expected.0))
    }

    /// Both ends in memory, until neither has anything to say. Errors: the client's, then the server's.
    fn handshake(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> (Result<(), Error>, Result<(), Error>) {
        let mut client = ClientConnection::new(client, ServerName::try_from(SERVER_NAME).unwrap()).unwrap();
        let mut server = ServerConnection::new(server).unwrap();
        talk(&mut client, &mut server)
    }

    fn talk(client: &mut ClientConnection, server: &mut ServerConnection) -> (Result<(), Error>, Result<(), Error>) {
        let mut results = (Ok(()), Ok(()));
        while client.wants_write() || server.wants_write() {
            let (mut to_server, mut to_client) = (Vec::new(), Vec::new());
            client.write_tls(&mut to_server).unwrap();
            if !to_server.is_empty() && results.1.is_ok() {
                server.read_tls(&mut &to_server[..]).unwrap();
                results.1 = server.process_new_packets().map(drop);
            }
            server.write_tls(&mut to_client).unwrap();
            if !to_client.is_empty() && results.0.is_ok() {
                client.read_tls(&mut &to_client[..]).unwrap();
                results.0 = client.process_new_packets().map(drop);
            }
        }
        results
    }

    /// What a server makes of the records of two words that a client has sent it, after something has happened to them on their way.
    fn delivered(on_their_way: impl FnOnce(Vec<Vec<u8>>) -> Vec<Vec<u8>>) -> Vec<u8> {
        let (alice, bob) = (pair(), pair());
        let name = ServerName::try_from(SERVER_NAME).unwrap();
        let mut client = ClientConnection::new(client(&alice, &bob), name).unwrap();
        let mut server = ServerConnection::new(self::server(&bob)).unwrap();
        assert_eq!(talk(&mut client, &mut server), (Ok(()), Ok(())));
        let record = |word: &str| {
            let mut record = Vec::new();
            client.writer().write_all(word.as_bytes()).unwrap();
            client.write_tls(&mut record).unwrap();
            record
        };
        let mut delivered = Vec::new();
        for record in on_their_way(["one ", "two "].map(record).to_vec()) {
            server.read_tls(&mut &record[..]).unwrap();
            let is_fine = server.process_new_packets().is_ok();
            // At the end of what has come it would block.
            let _ = server.reader().read_to_end(&mut delivered);
            if !is_fine {
                break;
            }
        }
        delivered
    }

    #[test]
    fn no_record_is_delivered_twice_or_out_of_order() {
        assert_eq!(delivered(|records| records), b"one two ");
        assert_eq!(delivered(|records| [&records[..1], &records[..]].concat()), b"one ");
        assert_eq!(delivered(|records| [&records[..], &records[1..]].concat()), b"one two ");
        assert_eq!(delivered(|records| records.into_iter().rev().collect()), b"");
        assert_eq!(delivered(|records| records[1..].to_vec()), b"");
    }

    /// Type, version, length.
    const RECORD_HEADER_BYTES: usize = 5;

    #[test]
    fn no_flipped_bit_of_a_record_is_delivered() {
        let mut bits = None;
        for bit in 0.. {
            let delivered = delivered(|mut records| {
                bits = Some(8 * records[0].len());
                if let Some(byte) = records[0].get_mut(bit / 8) {
                    *byte ^= 1 << (bit % 8);
                }
                records
            });
            if bits.is_some_and(|bits| bit == bits) {
                assert_eq!(delivered, b"one two ");
                return;
            }
            // Type and version in a record's header say nothing in TLS 1.3 (RFC 8446, 5.2): what is delivered is what was sent.
            let is_as_sent = bit < 8 * RECORD_HEADER_BYTES && delivered == b"one two ";
            assert!(delivered.is_empty() || is_as_sent, "bit {bit}: {delivered:?}");
        }
    }

    #[test]
    fn pinned_peers_meet() {
        let (alice, bob) = (pair(), pair());
        assert_eq!(handshake(client(&alice, &bob), server(&bob)), (Ok(()), Ok(())));
    }

    #[test]
    fn another_certificate_is_refused_by_the_client() {
        let (alice, bob, mallory) = (pair(), pair(), pair());
        let (of_client, of_server) = handshake(client(&alice, &bob), server(&mallory));
        assert!(matches!(of_client, Err(Error::InvalidCertificate(CertificateError::Other(_)))), "{of_client:?}");
        assert!(of_server.is_err());
    }

    #[test]
    fn a_server_with_a_stolen_certificate_is_refused() {
        let (alice, bob, mallory) = (pair(), pair(), pair());
        let mut config = (*server(&mallory)).clone();
        config.cert_resolver = stolen(&bob, &mallory);
        let (of_client, _) = handshake(client(&alice, &bob), Arc::new(config));
        assert_eq!(of_client, Err(Error::InvalidCertificate(CertificateError::BadSignature)));
    }

    #[test]
    fn a_client_with_a_stolen_certificate_is_refused() {
        let (alice, bob, mallory) = (pair(), pair(), pair());
        let mut config = (*client(&mallory, &bob)).clone();
        config.client_auth_cert_resolver = stolen(&alice, &mallory);
        let (_, of_server) = handshake(Arc::new(config), server(&bob));
        assert_eq!(of_server, Err(Error::InvalidCertificate(CertificateError::BadSignature)));
    }

    #[test]
    fn a_client_without_a_certificate_and_tls_1_2_are_refused() {
        let bob = pair();
        let without_certificate = |version| {
            let algorithms = provider().signature_verification_algorithms;
            let verifier = PinnedServer { expected: ContentHash::of(&bob.0), algorithms };
            let builder = ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[version]).unwrap();
            let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier));
            Arc::new(builder.with_no_client_auth())
        };
        let anonymous = handshake(without_certificate(&TLS13), server(&bob));
        assert_eq!(anonymous.1, Err(Error::NoCertificatesPresented));
        let old = handshake(without_certificate(&TLS12), server(&bob));
        assert!(matches!(old.1, Err(Error::PeerIncompatible(_))), "{old:?}");
    }
}
