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
