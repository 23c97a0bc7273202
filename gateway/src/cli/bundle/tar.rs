//! An archive of small files in memory, in the form `ustar`.

/// What everything in an archive is a multiple of.
const BLOCK: usize = 512;
/// Longest name of a file.
const NAME_MAX: usize = 100;

/// An archive.
#[derive(Debug, Default)]
pub struct Tar(Vec<u8>);

impl Tar {
    /// Puts a file in, for its owner alone, as of `time` (seconds since 1970). A name is cut to 100 bytes.
    pub fn add(&mut self, name: &str, bytes: &[u8], time: u64) {
        let mut head = [0; BLOCK];
        let name = &name.as_bytes()[..name.len().min(NAME_MAX)];
        let mut put = |at: usize, field: &[u8]| head[at..at + field.len()].copy_from_slice(field);
        put(0, name);
        put(100, b"0000600\0");
        put(108, b"0000000\0");
        put(116, b"0000000\0");
        put(124, format!("{:011o}\0", bytes.len()).as_bytes());
        put(
            136,
            format!("{:011o}\0", time.min(0o777_7777_7777)).as_bytes(),
        );
        // The sum is made with its own field blank.
        put(148, b"        ");
        put(156, b"0");
        put(257, b"ustar\x0000");
        let sum: u32 = head.iter().map(|byte| u32::from(*byte)).sum();
        head[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0.extend(head);
        self.0.extend(bytes);
        self.0.resize(self.0.len().next_multiple_of(BLOCK), 0);
    }

    /// The whole, with its end.
    pub fn finish(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 2 * BLOCK, 0);
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archive_is_read_by_the_system() {
        let mut tar = Tar::default();
        tar.add("a/one.txt", b"first\n", 1_000_000_000);
        tar.add("a/two.txt", &[b'x'; 513], 0);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.tar");
        std::fs::write(&path, tar.finish()).unwrap();
        let untar = std::process::Command::new("tar")
            .arg("--extract")
            .arg("--file")
            .arg(&path)
            .arg("--directory")
            .arg(dir.path())
            .status();
        assert!(untar.unwrap().success());
        assert_eq!(
            std::fs::read(dir.path().join("a/one.txt")).unwrap(),
            b"first\n"
        );
        assert_eq!(
            std::fs::read(dir.path().join("a/two.txt")).unwrap(),
            [b'x'; 513]
        );
    }
}
