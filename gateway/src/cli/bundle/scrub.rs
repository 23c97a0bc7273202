//! Takes secrets out of a text: those that are known, and what looks like one.
//!
//! It is the second line: what is put into a bundle is chosen to have none. Rather a word too many is taken out than one
//! too few.

/// What stands in a secret's place.
pub const LEFT_OUT: &str = "(left out)";

/// Shorter ones are not looked for: half of the text would be taken out.
const KNOWN_LEN_MIN: usize = 6;

/// What a word begins with whose rest is secret.
const TOKENS: [&str; 5] = ["qry_", "AKIA", "ASIA", "eyJ", "hvs."];

/// Behind a name that ends in one of these, and `=` or `:`, stands a secret.
const NAMES: [&str; 11] = [
    "secret",
    "password",
    "passwd",
    "token",
    "secret_key",
    "access_key",
    "access_key_id",
    "signature",
    "credential",
    "authorization",
    "secretkey",
];

/// What is known to be secret.
#[derive(Default)]
pub struct Scrubber {
    known: Vec<String>,
}

impl Scrubber {
    /// Looks for this too, wherever it stands.
    pub fn know(&mut self, secret: &str) {
        let secret = secret.trim();
        if secret.len() >= KNOWN_LEN_MIN && !self.known.iter().any(|known| known == secret) {
            self.known.push(secret.to_owned());
            // One may be within another.
            self.known
                .sort_by_key(|known| std::cmp::Reverse(known.len()));
        }
    }

    /// The secrets of a file of `name = value` lines, by their names, or of `name value` lines: credentials, or a keyring.
    pub fn know_values(&mut self, text: &str) {
        for line in text.lines().map(str::trim) {
            let value = match line.split_once('=') {
                Some((name, value)) if !name.trim_end().contains([' ', '\t']) => {
                    let name = name.to_ascii_lowercase();
                    let is_secret = ["key", "secret", "token", "password"]
                        .iter()
                        .any(|word| name.contains(word));
                    if !is_secret {
                        continue;
                    }
                    value
                }
                _ => line.split_once([' ', '\t']).map_or("", |(_, value)| value),
            };
            let value = value.trim();
            self.know(value);
            self.know(value.trim_matches(['"', '=']));
            // With a remark behind it.
            self.know(value.split(" #").next().unwrap_or_default());
        }
    }

    /// The text without secrets.
    pub fn clean(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for secret in &self.known {
            text = text.replace(secret, LEFT_OUT);
        }
        let mut out = String::with_capacity(text.len());
        let mut in_key = false;
        for line in text.split_inclusive('\n') {
            if line.contains("-----BEGIN") {
                in_key = true;
                out.push_str(LEFT_OUT);
                out.push('\n');
            }
            if !in_key {
                clean_line(line, &mut out);
            }
            in_key &= !line.contains("-----END");
        }
        out
    }
}

/// Ends a word.
fn is_end(c: char) -> bool {
    c.is_whitespace() || "\"'`,;&<>()[]{}|\\".contains(c)
}

/// What may stand between a name and its value, beside the sign.
const GAP: &str = " \t\"'\\";

fn clean_line(line: &str, out: &mut String) {
    let mut rest = line;
    while !rest.is_empty() {
        let end = rest.find(is_end).unwrap_or(rest.len());
        let (word, behind) = rest.split_at(end);
        clean_word(word, out);
        rest = behind;
        if is_before_secret(word, behind) {
            let skip = |c: char| !GAP.contains(c) && c != '=' && c != ':';
            let (gap, value) = behind.split_at(behind.find(skip).unwrap_or(behind.len()));
            out.push_str(gap);
            let (value, behind) = value.split_at(value.find(is_end).unwrap_or(value.len()));
            match value {
                // Nothing, or what says how the next word is meant.
                "" | "null" | "true" | "false" => out.push_str(value),
                "Bearer" | "Basic" => {
                    rest = &rest[gap.len()..];
                    continue;
                }
                _ => out.push_str(LEFT_OUT),
            }
            rest = behind;
        }
        let next = rest.chars().next().filter(|c| is_end(*c));
        out.extend(next);
        rest = &rest[next.map_or(0, char::len_utf8)..];
    }
}

/// Whether what follows a word is secret.
fn is_before_secret(word: &str, behind: &str) -> bool {
    let is_scheme = ["bearer", "basic"]
        .iter()
        .any(|s| word.eq_ignore_ascii_case(s));
    let is_named = named(word).is_some_and(|(_, value)| value.is_empty());
    let sign = behind.trim_start_matches(|c| GAP.contains(c));
    is_scheme || is_named || (ends_in_name(word) && sign.starts_with(['=', ':']))
}

fn clean_word(word: &str, out: &mut String) {
    if let Some((name, value)) = named(word)
        && !value.is_empty()
    {
        out.push_str(name);
        out.push_str(LEFT_OUT);
        return;
    }
    if let Some(at) = TOKENS.iter().filter_map(|token| word.find(token)).min()
        && word.len() - at >= 12
    {
        out.push_str(&word[..at]);
        out.push_str(LEFT_OUT);
        return;
    }
    // A user and a password before a host.
    if let Some((scheme, rest)) = word.split_once("://") {
        let authority = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        // The last @: a password may have one, and a slash, too.
        let last = match rest[..authority].rfind('@') {
            Some(at) => Some(at),
            None if rest[..authority].contains(':') => rest.rfind('@'),
            None => None,
        };
        if let Some(at) = last {
            out.push_str(scheme);
            out.push_str("://");
            out.push_str(LEFT_OUT);
            out.push_str(&rest[at..]);
            return;
        }
    }
    out.push_str(word);
}

/// The name of what is secret, with its sign, and the value.
fn named(word: &str) -> Option<(&str, &str)> {
    let at = word.match_indices(['=', ':']).map(|(at, _)| at);
    let mut at = at.filter(|at| ends_in_name(&word[..*at]) && !word[*at..].starts_with("://"));
    let at = at.next()? + 1;
    Some(word.split_at(at))
}

fn ends_in_name(word: &str) -> bool {
    let word = word
        .trim_end_matches([' ', '"'])
        .to_ascii_lowercase()
        .replace('-', "_");
    NAMES.iter().any(|name| word.ends_with(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clean(text: &str) -> String {
        let mut scrubber = Scrubber::default();
        scrubber.know("hunter2hunter2");
        scrubber.know("short");
        scrubber.know_values(
            "[acme]\naws_secret_access_key = from/the+file\n\nacme-2026 a2V5a2V5a2V5a2V5a2V5\n",
        );
        scrubber.clean(text)
    }

    #[test]
    fn secrets_are_taken_out_wherever_they_stand() {
        for text in [
            "x HUSH y",
            "http://user:HUSH@host/x",
            "s3 https://HUSH@host:9",
            "http://user:pa/HUSH@host/x",
            "http://user:p@HUSH@host/x",
            "url=http://u:HUSH@h, more",
            "qry_acme.k3j2h4_HUSHHUSH",
            "token: HUSH",
            "{\"secret_key\": \"HUSH\"}",
            "{\"secret_key\":\"HUSH\",\"a\":1}",
            "secret_key = \"HUSH\"",
            "said {\\\"password\\\": \\\"HUSH\\\"}",
            "password : HUSH",
            "AWS_SECRET_ACCESS_KEY=HUSH",
            "Authorization: Bearer HUSH",
            "authorization: Basic HUSH",
            "GET /x?X-Amz-Signature=HUSH&b=1",
            "GET /x?X-Amz-Security-Token=HUSH",
            "eyJhbGciOiJIUzI1.HUSH",
            "-----BEGIN PRIVATE KEY-----\nHUSH\n-----END PRIVATE KEY-----\n",
            "key -----BEGIN EC PRIVATE KEY----- HUSH -----END EC PRIVATE KEY-----",
        ] {
            for secret in ["hunter2hunter2", "from/the+file", "a2V5a2V5a2V5a2V5a2V5"] {
                let text = text.replace("x HUSH y", &format!("x {secret} y"));
                let cleaned = clean(&text.replace("HUSH", "s3cr3tw0rd"));
                assert!(!cleaned.contains("s3cr3tw0rd"), "{text}: {cleaned}");
                assert!(!cleaned.contains(secret), "{text}: {cleaned}");
                assert!(cleaned.contains(LEFT_OUT), "{text}: {cleaned}");
            }
        }
    }

    #[test]
    fn what_is_no_secret_stays() {
        for text in [
            "{\"volume\": \"acme/db\", \"rpo_ms\": 5}\n",
            "2026-11-26T10:00:00Z INFO store{url=s3://bucket/prefix}: put took 5ms\n",
            "nbd+unix:///acme/db?socket=/run/quarry/quarry-nbd.sock\n",
            "quarry_store_requests_total{operation=\"get\",outcome=\"ok\"} 5\n",
            "{\"session_token\": null, \"region\": \"eu-central-1\"}\n",
            "the short word: a@b\n",
            "token acme.k3j2h4 was made by uid 0\n",
            "  a = [1, 2]; \"b\": {\\ é}\n",
        ] {
            assert_eq!(clean(text), text);
        }
    }

    #[test]
    fn lines_behind_a_key_are_kept() {
        let cleaned = clean("a\n-----BEGIN X-----\nb\n-----END X-----\nc\n");
        assert_eq!(cleaned, format!("a\n{LEFT_OUT}\nc\n"));
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_gone_through(text in "(secret|token|Bearer|://|-----BEGIN|[=:@\"' \n\\\\é]|[a-z]){0,40}") {
            proptest::prop_assert!(clean(&text).len() <= text.len() + 40 * LEFT_OUT.len());
        }
    }
}
