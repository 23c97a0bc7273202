//! Clients by TLS: real ones, with the certificates of two tenants, and one without.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use quarry_objfmt::Sectors;
use rcgen::{CertificateParams, DnType};

use super::super::tests::Bench;
use super::super::wire::{self, Put as _, option, reply};
use super::super::{ExportDirectory, NbdServer};
use super::*;
use crate::tls::TlsFiles;
use crate::tls::testing::Authority;

/// Some exports of one volume.
struct Names(super::super::Export, &'static [&'static str]);

impl ExportDirectory for Names {
    fn lookup(&self, name: &str) -> Option<super::super::Export> {
        self.1.contains(&name).then(|| self.0.clone())
    }

    fn list(&self) -> Vec<String> {
        self.1.iter().map(|name| (*name).to_owned()).collect()
    }
}

struct Site {
    bench: Bench,
    dir: tempfile::TempDir,
    authority: Authority,
    port: u16,
}

impl Site {
    fn new() -> Self {
        let bench = Bench::new();
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::new(dir.path());
        let files = TlsFiles {
            client_ca: Some(dir.path().join("ca.pem")),
            ..authority.server()
        };
        let tls = Tls::load(files, &[]).unwrap();
        let names = Names(bench.export(), &["acme/db", "acme/log", "zebra/stripes"]);
        let server = NbdServer::new(Arc::new(names), Arc::default());
        let listener = bench.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let port = listener.local_addr().unwrap().port();
        bench.spawn(async move { server.serve_tls(listener, tls).await });
        Self {
            bench,
            dir,
            authority,
            port,
        }
    }

    /// A folder, as clients want it, with a certificate for a common name.
    fn client(&self, authority: &Authority, name: &str) -> PathBuf {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        let files = authority.issue("client", &params);
        let folder = self.dir.path().join(name.replace('/', "-"));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::copy(self.dir.path().join("ca.pem"), folder.join("ca-cert.pem")).unwrap();
        std::fs::rename(files.cert, folder.join("client-cert.pem")).unwrap();
        std::fs::rename(files.key, folder.join("client-key.pem")).unwrap();
        folder
    }

    /// What `qemu-img` says of an export; `None` if it is not installed.
    fn look(&self, folder: &Path, export: &str) -> Option<Result<String, String>> {
        let creds = format!(
            "tls-creds-x509,id=tls,dir={},endpoint=client",
            folder.display()
        );
        let port = self.port;
        let image = format!("driver=nbd,host=localhost,port={port},export={export},tls-creds=tls");
        run(
            "qemu-img",
            &["info", "--object", &creds, "--image-opts", &image],
        )
    }
}

/// What a program says, or why it failed; `None`, and a word about it, if it is not installed.
fn run(program: &str, args: &[&str]) -> Option<Result<String, String>> {
    let output = match Command::new(program).args(args).output() {
        Ok(output) => output,
        Err(error) => {
            quarry_tests::skip(&format!("{program}: {error}"));
            return None;
        }
    };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Some(if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(text(&output.stderr))
    })
}

#[test]
fn certificate_opens_what_it_names_and_nothing_else() {
    let site = Site::new();
    let acme = site.client(&site.authority, "acme");
    let Some(seen) = site.look(&acme, "acme/db") else {
        return;
    };
    assert!(seen.unwrap().contains("64 MiB"));
    let one = site.client(&site.authority, "acme/log");
    assert!(site.look(&one, "acme/log").unwrap().is_ok());
    let none = site.look(&acme, "acme/none").unwrap().unwrap_err();
    for (folder, export) in [(&acme, "zebra/stripes"), (&one, "acme/db")] {
        let refused = site.look(folder, export).unwrap().unwrap_err();
        let missing = none.replace("acme/none", export);
        assert_eq!(refused, missing, "as one that is not there");
    }
    // The same name, from somebody else's authority.
    let elsewhere = tempfile::tempdir().unwrap();
    let stranger = site.client(&Authority::new(elsewhere.path()), "acme");
    std::fs::copy(site.dir.path().join("ca.pem"), stranger.join("ca-cert.pem")).unwrap();
    assert!(site.look(&stranger, "acme/db").unwrap().is_err());
}

#[tokio::test(start_paused = true)]
async fn client_that_takes_nothing_does_not_outlive_what_served_it() {
    let (_client, stream) = tokio::io::duplex(64);
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let (serves, served) = oneshot::channel::<()>();
    let copying = tokio::spawn(copy(stream, ours, served));
    let reactor = tokio::spawn(async move {
        let sent = theirs.write_all(&[7; 4 << 20]).await;
        unreachable!("nobody takes so much: {sent:?}")
    });
    tokio::time::sleep(CLOSE_TIME_MAX).await;
    assert!(!copying.is_finished());
    reactor.abort();
    drop(serves);
    let ended = tokio::time::timeout(2 * CLOSE_TIME_MAX, copying).await;
    ended.unwrap().unwrap();
}

#[test]
fn data_by_tls_are_what_was_written_and_lists_hold_what_may_be_opened() {
    let site = Site::new();
    let acme = site.client(&site.authority, "acme");
    let folder = acme.display();
    let uri = |export: &str| {
        format!(
            "nbds://localhost:{}/{export}?tls-certificates={folder}",
            site.port
        )
    };
    let Some(list) = run("nbdinfo", &["--list", &uri("")]) else {
        return;
    };
    let list = list.unwrap();
    assert!(
        list.contains("acme/db") && list.contains("acme/log"),
        "{list}"
    );
    assert!(!list.contains("zebra"), "{list}");

    let (image, copy) = (site.dir.path().join("image"), site.dir.path().join("copy"));
    let size = usize::try_from(Sectors::from_bytes(64 << 20).unwrap().bytes()).unwrap();
    let bytes: Vec<u8> = (0..size)
        .map(|n| (n / 512 + n % 3).to_le_bytes()[0])
        .collect();
    std::fs::write(&image, &bytes).unwrap();
    run("nbdcopy", &[image.to_str().unwrap(), &uri("acme/db")])
        .unwrap()
        .unwrap();
    run("nbdcopy", &[&uri("acme/db"), copy.to_str().unwrap()])
        .unwrap()
        .unwrap();
    assert!(std::fs::read(&copy).unwrap() == bytes);
}

#[test]
fn client_without_tls_is_told_to_begin_it_and_nothing_more() {
    let site = Site::new();
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", site.port)).unwrap();
    stream.read_exact(&mut [0; 18]).unwrap();
    let mut out = Vec::new();
    out.put_u32(3);
    for code in [option::LIST, option::STRUCTURED_REPLY, 4711] {
        wire::put_option(&mut out, code, &[]);
    }
    wire::put_option(&mut out, option::STARTTLS, &[1]);
    wire::put_option(&mut out, option::EXPORT_NAME, b"acme/db");
    stream.write_all(&out).unwrap();
    let mut answers = Vec::new();
    stream.read_to_end(&mut answers).unwrap();
    let mut reader = wire::Reader::new(&answers);
    for (code, expected) in [
        (option::LIST, reply::ERR_TLS_REQD),
        (option::STRUCTURED_REPLY, reply::ERR_TLS_REQD),
        (4711, reply::ERR_TLS_REQD),
        (option::STARTTLS, reply::ERR_INVALID),
    ] {
        reader.u64().unwrap();
        assert_eq!((reader.u32(), reader.u32()), (Some(code), Some(expected)));
        let len = reader.u32().unwrap();
        reader.bytes(len as usize).unwrap();
    }
    assert_eq!(reader.u64(), None, "then it hangs up");
    drop(site.bench);
}
