//! Backends' certificates are verified against the system's CAs unless `--ca-cert-paths` is given. Tested
//! with the built program: variables of the environment belong to a whole process.

mod kit;

use std::process::Child;

use kit::program::{client, command, free_port, output};
use kit::{OK, ScriptedServer, TerminatorOptions, TestCa, TlsTerminator, json};

/// The program, killed when the test ends.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn ssl_cert_file_names_the_cas_of_backends() {
    let ca = TestCa::new();
    let (prefill, decode) =
        (ScriptedServer::always(json("200 OK", OK)).await, ScriptedServer::always(json("200 OK", OK)).await);
    let identity = ca.issue("server", &["localhost"]);
    let options = TerminatorOptions { identity, truncates: false, reads_slowly: false, client_ca: None };
    let front = TlsTerminator::start(decode.address(), options).await;
    let (prefill_url, decode_url, port) = (prefill.url(), front.url(), free_port());
    let (port_arg, ca_file) = (port.to_string(), ca.file());
    let args = [
        "--host",
        "127.0.0.1",
        "--port",
        &port_arg,
        "--prometheus-port",
        "0",
        "--prefill",
        &prefill_url,
        "--decode",
        &decode_url,
    ];
    let variables = [("SSL_CERT_FILE", ca_file.to_str().expect("a path in UTF-8"))];
    let _program = Program(command(args, &variables).spawn().expect("the program starts"));
    let response = client(port).await.post("/generate", r#"{"text":"a"}"#).await;
    assert_eq!((response.status(), response.text()), (200, OK));
}

#[test]
fn a_missing_ssl_cert_file_is_an_error_at_startup() {
    let args = ["--prefill", "http://127.0.0.1:1", "--decode", "https://127.0.0.1:2"];
    // The folder is not used beside the file.
    let variables = [("SSL_CERT_FILE", "/nonexistent/ca.pem"), ("SSL_CERT_DIR", "/etc/ssl/certs")];
    let output = output(args, &variables);
    let stderr = String::from_utf8(output.stderr).expect("UTF-8");
    assert!(!output.status.success(), "{stderr}");
    assert!(
        stderr.contains("no CA certificates found") && stderr.contains("/nonexistent/ca.pem"),
        "{stderr}"
    );
}
