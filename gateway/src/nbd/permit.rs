//! What a client's certificate lets it open.
//!
//! Its names say it: the subject's common names, and of its alternative names those of DNS and of the URI form
//! `quarry:NAME`. `acme` is all of that tenant's exports, `acme/db` the one of exactly that name. Who issues
//! certificates decides, so an authority in `access.nbd_client_ca` must issue none for other purposes.
//!
//! **Invariant:** a certificate that cannot be read opens nothing.

use std::collections::BTreeSet;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;

use super::{Export, ExportDirectory};

/// Names that are looked at in one certificate.
const NAMES_MAX: usize = 1024;

/// What begins a URI that names an export.
const SCHEME: &str = "quarry:";

/// The object identifier of a common name, 2.5.4.3, in DER.
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];

/// DER's tags that are read.
mod tag {
    pub const OBJECT_IDENTIFIER: u8 = 0x06;
    pub const UTF8: u8 = 0x0c;
    pub const PRINTABLE: u8 = 0x13;
    pub const IA5: u8 = 0x16;
    pub const SEQUENCE: u8 = 0x30;
    pub const SET: u8 = 0x31;
}

/// The exports that may be opened.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Permit(BTreeSet<String>);

impl Permit {
    /// Of a certificate that was found to be one of ours.
    pub fn of(cert: &CertificateDer<'_>) -> Self {
        let Ok(cert) = webpki::EndEntityCert::try_from(cert) else {
            return Self::default();
        };
        let common = common_names(cert.subject()).unwrap_or_default();
        let dns = cert.valid_dns_names().map(str::to_owned);
        let uris = cert
            .valid_uri_names()
            .filter_map(|uri| uri.strip_prefix(SCHEME));
        let all = common.into_iter().chain(dns).chain(uris.map(str::to_owned));
        Self(all.take(NAMES_MAX).collect())
    }

    /// Whether `export`, which is `tenant/volume`, may be opened.
    fn allows(&self, export: &str) -> bool {
        let tenant = export.split_once('/').map(|(tenant, _)| tenant);
        self.0.contains(export) || tenant.is_some_and(|tenant| self.0.contains(tenant))
    }
}

/// The exports of a directory that may be opened; there are no others.
pub(super) struct Permitted {
    pub directory: Arc<dyn ExportDirectory>,
    pub permit: Permit,
}

impl ExportDirectory for Permitted {
    fn lookup(&self, name: &str) -> Option<Export> {
        // First, so that who may not open it learns nothing of whether it is there.
        self.permit
            .allows(name)
            .then(|| self.directory.lookup(name))?
    }

    fn list(&self) -> Vec<String> {
        let mut all = self.directory.list();
        all.retain(|name| self.permit.allows(name));
        all
    }
}

/// The common names in a subject's DER: sets of pairs of an identifier and a text.
fn common_names(mut subject: &[u8]) -> Option<Vec<String>> {
    let mut names = Vec::new();
    while !subject.is_empty() {
        let (mut set, rest) = expect(subject, tag::SET)?;
        subject = rest;
        while !set.is_empty() {
            let (pair, rest) = expect(set, tag::SEQUENCE)?;
            set = rest;
            let (identifier, value) = expect(pair, tag::OBJECT_IDENTIFIER)?;
            if identifier != COMMON_NAME {
                continue;
            }
            let (kind, text, _) = element(value)?;
            if matches!(kind, tag::UTF8 | tag::PRINTABLE | tag::IA5) {
                names.push(std::str::from_utf8(text).ok()?.to_owned());
            }
        }
    }
    Some(names)
}

/// The content of the first element, which must be of a kind, and what follows it.
fn expect(bytes: &[u8], kind: u8) -> Option<(&[u8], &[u8])> {
    let (found, content, rest) = element(bytes)?;
    (found == kind).then_some((content, rest))
}

/// The tag and the content of the first element, and what follows it.
fn element(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&kind, bytes) = bytes.split_first()?;
    let (&first, mut bytes) = bytes.split_first()?;
    let len = match first {
        0..=0x7f => usize::from(first),
        // The number of bytes of the length; a certificate has no longer ones.
        0x81 | 0x82 => {
            let mut len = 0;
            for _ in 0x80..first {
                let (&byte, rest) = bytes.split_first()?;
                bytes = rest;
                len = len << 8 | usize::from(byte);
            }
            len
        }
        _ => return None,
    };
    let (content, rest) = bytes.split_at_checked(len)?;
    Some((kind, content, rest))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    use super::*;

    fn permit(common: &[&str], alternative: Vec<SanType>) -> Permit {
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::OrganizationName, "evil/org");
        for name in common {
            params.distinguished_name.push(DnType::CommonName, *name);
        }
        params.subject_alt_names = alternative;
        let cert = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        Permit::of(cert.der())
    }

    #[test]
    fn tenants_name_opens_its_exports_and_an_exports_name_that_one() {
        let acme = permit(&["acme"], Vec::new());
        for (export, allowed) in [
            ("acme/db", true),
            ("acme/db@nightly", true),
            ("acme2/db", false),
            ("evil/org", false),
            ("acme", true),
            ("", false),
        ] {
            assert_eq!(acme.allows(export), allowed, "{export}");
        }
        let one = permit(&["acme/db"], Vec::new());
        for (export, allowed) in [
            ("acme/db", true),
            ("acme/db@nightly", false),
            ("acme/db2", false),
            ("acme/d", false),
        ] {
            assert_eq!(one.allows(export), allowed, "{export}");
        }
    }

    #[test]
    fn alternative_names_count_and_other_uris_do_not() {
        let uri = |text: &str| SanType::URI(text.try_into().unwrap());
        let dns = |text: &str| SanType::DnsName(text.try_into().unwrap());
        let names = vec![uri("quarry:acme/db"), uri("https://x/y"), dns("zebra")];
        let permit = permit(&[], names);
        assert!(permit.allows("acme/db") && permit.allows("zebra/any"));
        assert!(!permit.allows("acme/other") && !permit.allows("https://x/y"));
    }

    #[test]
    fn certificate_that_is_none_opens_nothing() {
        let permit = Permit::of(&CertificateDer::from(vec![0x30, 0x82, 0xff]));
        assert_eq!(permit, Permit::default());
        assert!(!permit.allows("acme/db") && !permit.allows(""));
    }

    proptest! {
        #[test]
        fn subject_of_any_bytes_is_read_or_refused(bytes: Vec<u8>) {
            let _ = common_names(&bytes);
        }
    }
}
