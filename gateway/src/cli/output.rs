//! Where the answer goes, in the form that was asked for.

use std::io::{self, Write};

use serde::Serialize;

use super::{Failure, Format};

/// What was found, and that it is a failure.
#[derive(Serialize)]
struct Failed<'a, T> {
    #[serde(flatten)]
    found: &'a T,
    error: &'a Failure,
}

/// Standard output and its form.
pub(super) struct Console<'a> {
    format: Format,
    out: &'a mut dyn Write,
}

impl<'a> Console<'a> {
    pub fn new(format: Format, out: &'a mut dyn Write) -> Self {
        Self { format, out }
    }

    /// Whether programs read it.
    pub fn is_json(&self) -> bool {
        self.format == Format::Json
    }

    /// Writes what was found, and answers that it is a failure; for programs both are one document.
    pub fn show_failed<T: Serialize>(
        &mut self,
        found: &T,
        text: impl FnOnce(&T) -> String,
        failure: Failure,
    ) -> Result<(), Failure> {
        if !self.is_json() {
            self.show(found, text)?;
            return Err(failure);
        }
        let both = Failed {
            found,
            error: &failure,
        };
        self.show(&both, |_| String::new())?;
        Err(failure.told())
    }

    /// Prints `value` as JSON, or what `text` makes of it.
    pub fn show<T: Serialize>(
        &mut self,
        value: &T,
        text: impl FnOnce(&T) -> String,
    ) -> Result<(), Failure> {
        let mut answer = match self.format {
            Format::Json => serde_json::to_string_pretty(value).map_err(|error| {
                Failure::new(
                    "internal",
                    format!("cannot write JSON: {error}"),
                    "report this",
                )
            })?,
            Format::Text => text(value),
        };
        if !answer.ends_with('\n') {
            answer.push('\n');
        }
        self.raw(answer.as_bytes())
    }

    /// Prints bytes as they are. A reader that has gone away has all that it wants.
    pub fn raw(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        match self.out.write_all(bytes).and_then(|()| self.out.flush()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                let message = format!("cannot write the answer: {error}");
                Err(Failure::new(
                    "failed",
                    message,
                    "check where standard output goes",
                ))
            }
            _ => Ok(()),
        }
    }

    /// Tells people and, if asked for, programs why the call failed.
    pub fn fail(&mut self, failure: &Failure, err: &mut dyn Write) {
        // Nobody is left to tell when these cannot be written.
        let _ = writeln!(err, "quarry: {failure}");
        if self.is_json() && !failure.is_told() {
            let _ = self.show(&serde_json::json!({ "error": failure }), |_| String::new());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Broken(io::ErrorKind);

    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn answer_to_a_closed_pipe_is_no_failure() {
        let mut pipe = Broken(io::ErrorKind::BrokenPipe);
        Console::new(Format::Text, &mut pipe)
            .show(&1, |n| n.to_string())
            .unwrap();
        let mut full = Broken(io::ErrorKind::StorageFull);
        assert!(
            Console::new(Format::Text, &mut full)
                .show(&1, |n| n.to_string())
                .is_err()
        );
    }

    #[test]
    fn failure_as_json_is_on_both_outputs() {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let failure = Failure::new("not_found", "there is none", "make one");
        Console::new(Format::Json, &mut out).fail(&failure, &mut err);
        assert_eq!(
            String::from_utf8(err).unwrap(),
            "quarry: there is none; make one\n"
        );
        let json: serde_json::Value = serde_json::from_slice(&out).unwrap();
        let expected = serde_json::json!({"kind": "not_found", "message": "there is none", "remedy": "make one"});
        assert_eq!(json["error"], expected);
    }
}
