//! From text to [`Config`]: unknown names with the nearest known one, each mistake with its line.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::path::Path;

use toml::de::{DeTable, DeValue};

use crate::keys::{self, KEYS, Key, SECTIONS};
use crate::{Config, ConfigError, Place, validate};

/// Largest configuration or secret file that is read.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Names less alike than this are no help as a suggestion.
const LIKENESS_MIN: f64 = 0.66;

impl Config {
    /// Reads the file at `path` over the defaults. Relative paths in it start at its directory.
    ///
    /// # Errors
    /// The first mistake, with its line.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let path = std::path::absolute(path)
            .map_err(|source| unreadable("the configuration", path, source))?;
        let text =
            read_small(&path).map_err(|source| unreadable("the configuration", &path, source))?;
        Self::read(&text, Some(&path))
    }

    /// Reads a text over the defaults, as [`Config::load`] does; relative paths in it stay as they are.
    ///
    /// # Errors
    /// The first mistake, with its line.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        Self::read(text, None)
    }

    fn read(text: &str, path: Option<&Path>) -> Result<Self, ConfigError> {
        let place = |at: usize| Place {
            path: path.map(Path::to_owned),
            line: 1 + text.bytes().take(at).filter(|b| *b == b'\n').count(),
        };
        let base = path.and_then(Path::parent).unwrap_or(Path::new(""));
        let document = DeTable::parse(text).map_err(|error| ConfigError::Syntax {
            place: place(error.span().map_or(0, |span| span.start)),
            why: error.message().replace('\n', ", "),
        })?;

        let mut config = Self::default();
        let mut places: BTreeMap<&'static str, Place> = BTreeMap::new();
        for (section, body) in document.get_ref() {
            let name: &str = section.get_ref();
            let here = place(section.span().start);
            if !SECTIONS.iter().any(|(known, _)| *known == name) {
                return Err(unknown_section(name, here));
            }
            let DeValue::Table(entries) = body.get_ref() else {
                return Err(ConfigError::Syntax {
                    place: here,
                    why: format!("`{name}` is a section, written [{name}]"),
                });
            };
            for (entry, value) in entries {
                let here = place(entry.span().start);
                let full = format!("{name}.{}", entry.get_ref());
                let Some(key) = keys::find(&full) else {
                    return Err(unknown_key(name, entry.get_ref(), here));
                };
                (key.set)(&mut config, value.get_ref(), base).map_err(|why| {
                    ConfigError::Value {
                        place: Some(here.clone()),
                        key: key.path,
                        value: shown(key, text, value.span()),
                        why,
                        remedy: key.expected.to_owned(),
                    }
                })?;
                places.insert(key.path, here);
            }
        }
        validate::check(&config).map_err(|mut error| {
            if let ConfigError::Value { place, key, .. } = &mut error {
                *place = places.remove(key);
            }
            error
        })?;
        Ok(config)
    }
}

/// A value as it is written, cut to what an error message bears.
fn shown(key: &Key, text: &str, span: Range<usize>) -> String {
    if key.secret {
        return "(hidden)".to_owned();
    }
    let value = text.get(span).unwrap_or("").lines().next().unwrap_or("");
    match value.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &value[..end]),
        None => value.to_owned(),
    }
}

/// By common letters, or by slips of the fingers, whichever is kinder: the latter for short names.
fn likeness(a: &str, b: &str) -> f64 {
    strsim::jaro_winkler(a, b).max(strsim::normalized_damerau_levenshtein(a, b))
}

fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    known
        .map(|candidate| (likeness(name, candidate), candidate))
        .filter(|(likeness, _)| *likeness >= LIKENESS_MIN)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

fn unknown_section(name: &str, place: Place) -> ConfigError {
    // A key outside any section is a likelier slip than a section that nobody knows.
    let home = KEYS
        .iter()
        .find(|key| key.name() == name)
        .map(|key| format!("[{}] {name}", key.section()));
    let near =
        nearest(name, SECTIONS.iter().map(|(known, _)| *known)).map(|known| format!("[{known}]"));
    ConfigError::Unknown {
        place,
        what: "section",
        name: name.to_owned(),
        nearest: home.or(near),
    }
}

fn unknown_key(section: &str, name: &str, place: Place) -> ConfigError {
    let here = nearest(
        name,
        KEYS.iter()
            .filter(|key| key.section() == section)
            .map(Key::name),
    );
    let elsewhere = || {
        KEYS.iter()
            .find(|key| key.name() == name)
            .map(|key| format!("[{}] {name}", key.section()))
    };
    ConfigError::Unknown {
        place,
        what: "key",
        name: format!("{section}.{name}"),
        nearest: elsewhere().or(here.map(str::to_owned)),
    }
}

pub(crate) fn unreadable(what: &'static str, path: &Path, source: io::Error) -> ConfigError {
    ConfigError::Read {
        what,
        path: path.to_owned(),
        source,
    }
}

/// A text file of at most [`FILE_BYTES_MAX`] bytes.
pub(crate) fn read_small(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?
        .take(FILE_BYTES_MAX + 1)
        .read_to_string(&mut text)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            "it is larger than 1 MiB",
        ));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        Config::parse(text).expect_err(text).to_string()
    }

    #[test]
    fn file_with_every_kind_of_value_is_read() {
        let config = Config::parse(
            "[daemon]\nlisten = \"127.0.0.1:9464\"\nlog = \"json\"\n\
             [store]\nurl = \"s3://b/p\"\npath_style = false\n\
             [cache]\nsize = 1_073_741_824\ndirty_max = \"512MiB\"\n\
             [reactor]\nthreads = 2\n[writeback]\ndelay = \"500ms\"\n",
        )
        .unwrap();
        assert_eq!(
            config.daemon.listen,
            Some("127.0.0.1:9464".parse().unwrap())
        );
        assert_eq!(config.daemon.log, crate::LogFormat::Json);
        assert_eq!(config.store.path_style, Some(false));
        assert_eq!(config.cache.size, Some(crate::Size::new(1 << 30)));
        assert_eq!(
            config.cache.dirty_max,
            crate::Bound::Size(crate::Size::new(512 << 20))
        );
        assert_eq!(config.reactor.threads, 2);
        assert_eq!(
            config.writeback.delay,
            std::time::Duration::from_millis(500)
        );
    }

    #[test]
    fn unknown_names_get_the_nearest_and_the_line() {
        assert_eq!(
            refusal("[cache]\nram = \"64MiB\"\ndirtymax = 1\n"),
            "line 3: there is no key `cache.dirtymax`; did you mean `dirty_max`?"
        );
        assert_eq!(
            refusal("\n[cahce]\n"),
            "line 2: there is no section `cahce`; did you mean `[cache]`?"
        );
        assert_eq!(
            refusal("url = \"x\""),
            "line 1: there is no section `url`; did you mean `[store] url`?"
        );
        assert_eq!(
            refusal("[daemon]\nthreads = 1"),
            "line 2: there is no key `daemon.threads`; did you mean `[reactor] threads`?"
        );
        assert!(refusal("[zzz]").ends_with("`quarry config example` lists them all"));
    }

    #[test]
    fn wrong_values_name_key_value_and_remedy() {
        assert_eq!(
            refusal("[cache]\nram = \"much\"\n"),
            "line 2: cache.ram = \"much\": it is not a size; write a size such as \"64MiB\""
        );
        assert_eq!(
            refusal("[writeback]\ndelay = 5\n"),
            "line 2: writeback.delay = 5: it is an integer; write a duration such as \"5s\" or \"500ms\""
        );
        assert!(refusal("[reactor]\nthreads = -1").contains("out of range"));
        assert!(refusal("[daemon]\nlisten = \"9464\"").contains("such as \"127.0.0.1:9464\""));
        assert!(refusal("daemon = 3").contains("written [daemon]"));
    }

    #[test]
    fn value_outside_its_limits_has_its_line() {
        let text = refusal("[daemon]\n\n[reactor]\nthreads = 0\n");
        assert!(text.starts_with("line 4: reactor.threads = 0: "), "{text}");
    }

    #[test]
    fn broken_toml_has_its_line() {
        assert!(refusal("[daemon]\nlog = \n").starts_with("line 2: "));
        assert!(refusal("[daemon]\nlog = \"human\"\nlog = \"json\"\n").starts_with("line 3: "));
    }

    #[test]
    fn secret_of_the_wrong_type_is_not_shown() {
        let text = refusal("[store]\nsecret_key = 123456\n");
        assert!(
            !text.contains("123456") && text.contains("(hidden)"),
            "{text}"
        );
    }

    #[test]
    fn load_resolves_paths_at_the_files_directory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("quarry.toml");
        std::fs::write(
            &path,
            "[daemon]\ndata_dir = \"state\"\n[cache]\npath = \"/abs\"\n",
        )
        .unwrap();
        let config = Config::load(&path).unwrap();
        assert_eq!(config.daemon.data_dir, dir.path().join("state"));
        assert_eq!(config.cache.path.as_deref(), Some(Path::new("/abs")));

        let gone = Config::load(&dir.path().join("none.toml"))
            .unwrap_err()
            .to_string();
        assert!(
            gone.contains("none.toml") && gone.contains("check the path"),
            "{gone}"
        );
    }
}
