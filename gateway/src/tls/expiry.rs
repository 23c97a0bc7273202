//! When a certificate ends: the one thing of it that is told to operators (RFC 5280, 4.1).

use std::path::Path;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

const INTEGER: u8 = 0x02;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
const SEQUENCE: u8 = 0x30;
const VERSION: u8 = 0xa0;

/// When the first certificate in the PEM file ends, in seconds since 1970; `None` if there is none that can be read.
pub(crate) fn of_file(path: &Path) -> Option<u64> {
    let cert = CertificateDer::from_pem_file(path).ok()?;
    not_after(&cert)
}

fn not_after(der: &[u8]) -> Option<u64> {
    let (certificate, _) = take(der, SEQUENCE)?;
    let (mut to_be_signed, _) = take(certificate, SEQUENCE)?;
    if let Some((_, rest)) = take(to_be_signed, VERSION) {
        to_be_signed = rest;
    }
    let (_, rest) = take(to_be_signed, INTEGER)?;
    let (_signature, rest) = take(rest, SEQUENCE)?;
    let (_issuer, rest) = take(rest, SEQUENCE)?;
    let (validity, _) = take(rest, SEQUENCE)?;
    let (_, end) = time(validity)?;
    let (text, _) = time(end)?;
    seconds(&text)
}

/// The content of the value at the start, if it has this tag, and what is behind it.
fn take(der: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (found, rest) = der.split_first()?;
    let (first, rest) = rest.split_first()?;
    let (len, rest) = match usize::from(*first) {
        len @ ..0x80 => (len, rest),
        // So many bytes of length follow; no certificate needs more than four.
        long => {
            let (bytes, rest) = rest.split_at_checked(long & 0x7f)?;
            if bytes.is_empty() || bytes.len() > 4 {
                return None;
            }
            let len = bytes
                .iter()
                .fold(0, |len, byte| len << 8 | usize::from(*byte));
            (len, rest)
        }
    };
    if *found != tag {
        return None;
    }
    rest.split_at_checked(len)
}

/// A time with all digits of its year, and what is behind it.
fn time(der: &[u8]) -> Option<(String, &[u8])> {
    if let Some((text, rest)) = take(der, GENERALIZED_TIME) {
        return Some((str::from_utf8(text).ok()?.to_owned(), rest));
    }
    let (text, rest) = take(der, UTC_TIME)?;
    let text = str::from_utf8(text).ok()?;
    let century = if text < "5" { "20" } else { "19" };
    Some((format!("{century}{text}"), rest))
}

/// `YYYYMMDDhhmmssZ` as seconds since 1970; earlier ones are 1970.
fn seconds(text: &str) -> Option<u64> {
    let number = |from, upto| text.get(from..upto)?.parse::<i64>().ok();
    let (year, month, day) = (number(0, 4)?, number(4, 6)?, number(6, 8)?);
    let (hour, minute, second) = (number(8, 10)?, number(10, 12)?, number(12, 14)?);
    // Years begin in March, so that a leap day is the last of one.
    let (year, month) = if month < 3 {
        (year - 1, month + 9)
    } else {
        (year, month - 3)
    };
    let of_years = year * 365 + year / 4 - year / 100 + year / 400;
    // To the first of March of the year 0 from 1970 it is 719,468 days.
    let days = of_years + (month * 153 + 2) / 5 + day - 1 - 719_468;
    let seconds = ((days * 24 + hour) * 60 + minute) * 60 + second;
    Some(u64::try_from(seconds).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, date_time_ymd};

    use super::*;

    #[test]
    fn end_of_a_certificate_is_found_in_both_forms_of_times() {
        for (year, month, day) in [
            (2026, 11, 26),
            (2028, 2, 29),
            (2049, 12, 31),
            (2050, 1, 1),
            (2100, 3, 1),
        ] {
            let end = date_time_ymd(year, month, day);
            let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
            params.not_after = end;
            let cert = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
            let expected = u64::try_from(end.unix_timestamp()).unwrap();
            assert_eq!(not_after(cert.der()), Some(expected), "{year}");
            for len in 0..cert.der().len() {
                // Whatever is there of it.
                assert_eq!(not_after(&cert.der()[..len]), None);
            }
        }
    }

    #[test]
    fn length_that_is_none_is_no_certificate() {
        assert_eq!(not_after(&[SEQUENCE, 0x80]), None);
        assert_eq!(not_after(&[SEQUENCE, 0xff, 1, 2]), None);
        assert_eq!(seconds("2026"), None);
    }
}
