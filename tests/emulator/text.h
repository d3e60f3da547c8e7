// Pieces of text.
#pragma once

#include <algorithm>
#include <cctype>
#include <string>
#include <vector>

namespace emulator {

inline bool starts_with(const std::string& s, const char* start) { return s.rfind(start, 0) == 0; }
inline bool contains(const std::string& s, const char* part) { return s.find(part) != std::string::npos; }
inline bool ends_with(const std::string& s, const std::string& end) {
  return s.size() >= end.size() && s.compare(s.size() - end.size(), end.size(), end) == 0;
}
inline std::string trimmed(const std::string& s) {
  const size_t begin = s.find_first_not_of(" \t\r\n");
  return begin == std::string::npos ? "" : s.substr(begin, s.find_last_not_of(" \t\r\n") - begin + 1);
}
inline std::string without_brackets(const std::string& s) { return trimmed(s.substr(1, s.size() - 2)); }

// The parts between separators that are not within braces or brackets.
inline std::vector<std::string> split(const std::string& s, char separator) {
  std::vector<std::string> parts(1);
  int depth = 0;
  for (const char c : s) {
    depth += (c == '{' || c == '[') - (c == '}' || c == ']');
    if (c == separator && depth == 0) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  for (std::string& part : parts) part = trimmed(part);
  return parts;
}

}  // namespace emulator
