//! A CA and its certificates, a TLS client, and a TLS terminator in front of a scripted server.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    date_time_ymd,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig, SupportedProtocolVersion};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy, split};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, server};

use super::client::Response;
use super::http::{Head, read_body, read_head};
use super::program::Folder;
use super::with_timeout;

/// A CA with a folder for the certificates it issues.
pub struct TestCa {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: Folder,
}

/// The files of a certificate and its key.
#[derive(Debug, Clone)]
pub struct Identity {
    pub cert: PathBuf,
    pub key: PathBuf,
}

impl TestCa {
    pub fn new() -> Self {
        // No two CAs have the same name, or a verifier would try the wrong one first.
        let folder = Folder::new("tls");
        let mut params = CertificateParams::new(vec![]).expect("no names");
        params.distinguished_name.push(DnType::CommonName, format!("CA {:?}", folder.path("").file_name()));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let issuer = CertifiedIssuer::self_signed(params, key).expect("a certificate");
        let authority = Self { issuer, folder };
        fs::write(authority.file(), authority.issuer.pem()).expect("a file");
        authority
    }

    /// The file of the CA's certificate.
    pub fn file(&self) -> PathBuf {
        self.path("ca.pem")
    }

    /// A path in this CA's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path(name)
    }

    /// Issues a certificate for these DNS names or addresses into files named after `file`.
    pub fn issue(&self, file: &str, names: &[&str]) -> Identity {
        self.issue_until(file, names, 2100)
    }

    /// The same, expired in 2021.
    pub fn issue_expired(&self, file: &str, names: &[&str]) -> Identity {
        self.issue_until(file, names, 2021)
    }

    fn issue_until(&self, file: &str, names: &[&str], year: i32) -> Identity {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).expect("good names");
        (params.not_before, params.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(year, 1, 1));
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().expect("a key");
        let cert = params.signed_by(&key, &self.issuer).expect("a certificate");
        let identity = Identity {
            cert: self.path(&format!("{file}.cert.pem")),
            key: self.path(&format!("{file}.key.pem")),
        };
        fs::write(&identity.cert, cert.pem()).expect("a file");
        fs::write(&identity.key, key.serialize_pem()).expect("a file");
        identity
    }

    fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(self.issuer.der().clone()).expect("a CA");
        roots
    }

    /// The configuration of a client that trusts this CA.
    pub fn client(&self, alpn: &[&str]) -> Arc<ClientConfig> {
        self.client_of(rustls::ALL_VERSIONS, alpn)
    }

    /// The same for these versions of TLS only.
    pub fn client_of(
        &self,
        versions: &[&'static SupportedProtocolVersion],
        alpn: &[&str],
    ) -> Arc<ClientConfig> {
        let builder = ClientConfig::builder_with_provider(provider()).with_protocol_versions(versions);
        let builder = builder.expect("versions of TLS").with_root_certificates(self.roots());
        let mut config = builder.with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        Arc::new(config)
    }
}

impl Identity {
    fn load(&self) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let cert = CertificateDer::from_pem_file(&self.cert).expect("a certificate");
        (vec![cert], PrivateKeyDer::from_pem_file(&self.key).expect("a key"))
    }
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// A TLS handshake with the server `localhost` at an address.
pub async fn tls_handshake(
    address: SocketAddr,
    config: Arc<ClientConfig>,
) -> std::io::Result<TlsStream<TcpStream>> {
    let socket = TcpStream::connect(address).await?;
    let name = ServerName::try_from("localhost").expect("a name");
    with_timeout("a TLS handshake", TlsConnector::from(config).connect(name, socket)).await
}

/// [`super::Client`] over TLS.
pub struct TlsClient {
    pub stream: TlsStream<TcpStream>,
    buffer: Vec<u8>,
}

impl TlsClient {
    pub async fn connect(address: SocketAddr, config: Arc<ClientConfig>) -> Self {
        let stream = tls_handshake(address, config).await.expect("a good certificate");
        Self { stream, buffer: Vec::new() }
    }

    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).await.expect("the router reads");
        self.stream.flush().await.expect("the router reads");
    }

    pub async fn send_request(&mut self, target: &str, body: &[u8]) {
        let length = body.len();
        let head = format!("POST {target} HTTP/1.1\r\nhost: router\r\ncontent-length: {length}\r\n\r\n");
        self.send([head.as_bytes(), body].concat()).await;
    }

    pub async fn post(&mut self, target: &str, body: &[u8]) -> Response {
        self.send_request(target, body).await;
        self.response().await
    }

    pub async fn response(&mut self) -> Response {
        let head = self.head().await;
        let (body, complete) =
            with_timeout("a response body", read_body(&mut self.stream, &mut self.buffer, &head)).await;
        Response { head, body, complete }
    }

    pub async fn head(&mut self) -> Head {
        let head = with_timeout("a response head", read_head(&mut self.stream, &mut self.buffer)).await;
        head.expect("a response before the connection's end")
    }

    /// Reads body bytes, with their framing, up to and including `wanted`.
    pub async fn read_until(&mut self, wanted: &str) {
        let read = async {
            while !String::from_utf8_lossy(&self.buffer).contains(wanted) {
                let count = self.stream.read_buf(&mut self.buffer).await.expect("the router writes");
                assert_ne!(count, 0, "the connection ended before {wanted:?}");
            }
        };
        with_timeout(wanted, read).await;
        let end = self.buffer.windows(wanted.len()).position(|window| window == wanted.as_bytes());
        self.buffer.drain(..end.expect("it was there") + wanted.len());
    }

    /// Waits for the connection to end, which must be announced by a close_notify.
    pub async fn expect_clean_close(&mut self) {
        let mut rest = Vec::new();
        with_timeout("the connection's end", self.stream.read_to_end(&mut rest))
            .await
            .expect("a close_notify");
        assert!(rest.is_empty(), "{}", rest.escape_ascii());
    }

    /// The certificate that the router presented.
    pub fn server_certificate(&self) -> CertificateDer<'static> {
        self.stream.get_ref().1.peer_certificates().expect("a certificate")[0].clone()
    }
}

/// How a TLS terminator behaves.
#[derive(Clone)]
pub struct TerminatorOptions {
    pub identity: Identity,
    /// Closes connections without a close_notify.
    pub truncates: bool,
    /// Reads a little at a time, so that the router can never write a body at once.
    pub reads_slowly: bool,
    /// Requires a client certificate of this CA.
    pub client_ca: Option<PathBuf>,
}

/// What the terminator saw of a handshake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handshake {
    pub name: Option<String>,
    pub alpn: Option<Vec<u8>>,
    pub resumed: bool,
    pub has_certificate: bool,
}

/// Terminates TLS in front of a plain server.
pub struct TlsTerminator {
    address: SocketAddr,
    handshakes: Arc<Mutex<Vec<Handshake>>>,
    /// Connections that the router ended with a close_notify.
    closed_cleanly: Arc<AtomicUsize>,
    /// Connections that were closed, as far as the kernel knows.
    finished: Arc<AtomicUsize>,
    accepting: JoinHandle<()>,
}

impl TlsTerminator {
    pub async fn start(backend: SocketAddr, options: TerminatorOptions) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound address");
        let acceptor = TlsAcceptor::from(Arc::new(config(&options)));
        let handshakes = Arc::<Mutex<Vec<Handshake>>>::default();
        let closed_cleanly = Arc::<AtomicUsize>::default();
        let finished = Arc::<AtomicUsize>::default();
        let (seen, ended, over) =
            (Arc::clone(&handshakes), Arc::clone(&closed_cleanly), Arc::clone(&finished));
        let accepting = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                let (acceptor, seen) = (acceptor.clone(), Arc::clone(&seen));
                let (ended, over) = (Arc::clone(&ended), Arc::clone(&over));
                connections.spawn(async move {
                    socket.set_nodelay(true).expect("TCP_NODELAY");
                    let Ok(stream) = acceptor.accept(socket).await else { return };
                    seen.lock().unwrap().push(handshake(&stream));
                    relay(stream, backend, options.truncates, options.reads_slowly, &ended).await;
                    over.fetch_add(1, Ordering::SeqCst);
                });
            }
        });
        Self { address, handshakes, closed_cleanly, finished, accepting }
    }

    pub fn url(&self) -> String {
        format!("https://localhost:{}", self.address.port())
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn handshakes(&self) -> Vec<Handshake> {
        self.handshakes.lock().unwrap().clone()
    }

    pub async fn closed_cleanly(&self, count: usize) {
        reaches("a connection's clean end", &self.closed_cleanly, count).await;
    }

    /// Waits until `count` connections have been closed by either side.
    pub async fn finished(&self, count: usize) {
        reaches("a connection's end", &self.finished, count).await;
    }
}

async fn reaches(what: &str, counter: &AtomicUsize, count: usize) {
    with_timeout(what, async {
        while counter.load(Ordering::SeqCst) < count {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

impl Drop for TlsTerminator {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

fn config(options: &TerminatorOptions) -> ServerConfig {
    let builder = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
    let builder = builder.expect("versions of TLS");
    let builder = match &options.client_ca {
        None => builder.with_no_client_auth(),
        Some(ca) => {
            let mut roots = RootCertStore::empty();
            roots.add(CertificateDer::from_pem_file(ca).expect("a certificate")).expect("a CA");
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider());
            builder.with_client_cert_verifier(verifier.build().expect("a verifier"))
        }
    };
    let (certs, key) = options.identity.load();
    let mut config = builder.with_single_cert(certs, key).expect("a key that fits");
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config
}

fn handshake(stream: &server::TlsStream<TcpStream>) -> Handshake {
    let session = stream.get_ref().1;
    Handshake {
        name: session.server_name().map(str::to_owned),
        alpn: session.alpn_protocol().map(<[u8]>::to_vec),
        resumed: session.handshake_kind() == Some(rustls::HandshakeKind::Resumed),
        has_certificate: session.peer_certificates().is_some(),
    }
}

async fn copy_up(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    reads_slowly: bool,
) -> std::io::Result<()> {
    let mut buffer = vec![0; 16 << 10];
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            return Ok(());
        }
        to.write_all(&buffer[..count]).await?;
        if reads_slowly {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// Relays in both directions until one side ends.
async fn relay(
    stream: server::TlsStream<TcpStream>,
    backend: SocketAddr,
    truncates: bool,
    reads_slowly: bool,
    closed_cleanly: &AtomicUsize,
) {
    let mut plain = TcpStream::connect(backend).await.expect("the server behind");
    plain.set_nodelay(true).expect("TCP_NODELAY");
    let (mut from_server, mut to_server) = plain.split();
    let (mut from_router, mut to_router) = split(stream);
    tokio::select! {
        up = copy_up(&mut from_router, &mut to_server, reads_slowly) => {
            closed_cleanly.fetch_add(usize::from(up.is_ok()), Ordering::SeqCst);
        }
        _ = copy(&mut from_server, &mut to_router) => {
            if !truncates {
                to_router.shutdown().await.ok();
            }
        }
    }
}
